"""How is a network best called, do batches of blocks pay, and what does reduced precision change?

Networks: the two that ship with the package, and two of the size that CSBDeep and StarDist build by default
(CARE: depth 2, 32 filters; StarDist: 96 rays, 32 filters, grid (1, 2, 2)) with random weights.

Calls: Keras' ``predict`` (what both libraries do per tile), ``predict_on_batch``, the model called directly,
one graph for every shape (``run_network``, this package), and a graph traced for one shape. For each: the
first call of a fresh model, steady calls on a small and a large block, the first call with a new shape, how
often the graph was traced, and the largest difference from ``predict``. Times are the best of the repeats,
CPU seconds of all threads beside wall seconds.

Batches: seconds per block for 1 to 8 blocks in one call of the graph, and what share of a block is core at
the network's halo. Eight blocks in a batch take the memory of one block of eight times the volume.

Precision: time in ``mixed_bfloat16`` and ``mixed_float16`` and difference of the outputs from float32 on a
simulated volume; the intensities of CARE block by block and in one piece; StarDist's instances against those
in float32.

Prediction before the first measurement: ``predict`` costs 0.1 s per call beyond the network, the others 10 ms
(called directly 60 ms), so a small network on a small block is 10 times faster with one graph, a default-size
network on a large block 1.1 times. A new shape costs ``predict`` 0.5 s and the graph 0.1 s. A batch of 8
small blocks takes 0.7 times the time of 8 calls, of large blocks the same time, and a larger block beats
both, because less of it is halo. On a CPU, float16 is slower by far, bfloat16 faster where the processor has
instructions for it; StarDist's instances are the same but for a few at the threshold (F1 above 0.99).

Outcome on two cores that other work kept busy (so CPU seconds count, not wall): ``predict`` costs 0.05 to
0.08 s per call beyond the network, 2 to 11 times one graph on 16 x 32 x 32 and 1.06 to 1.4 times on the
largest blocks; called directly a model costs 0.03 to 0.04 s more. ``predict_on_batch`` is as fast as one
graph. A graph per shape is no faster either, and each new shape costs 0.2 s; with one graph nothing, nor with
this Keras' ``predict``, which was wrong. Batches of 8 take 0.4 to 0.95 of the time one by one on 16 x 32 x
32, 0.88 to 0.98 on 32 x 64 x 64; two of the largest 1.0; and none of the small blocks has any core inside a
volume: so there are no batches. bfloat16 takes 1.4 to 2 times less time on a processor with instructions for
it, float16 8 to 10 times more.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import environment
import numpy as np

from chunkrestore import metrics, models
from chunkrestore.grid import BlockGrid
from chunkrestore.kernels import network
from chunkrestore.kernels.precision import Precision, in_precision
from chunkrestore.operators.care import Care
from chunkrestore.simulate import embryo
from chunkrestore.statistics import of_array

RESULTS = Path(__file__).parent / "results" / "network_calls.json"
Shape = tuple[int, ...]
LARGEST = {
    "care3d-demo": (64, 128, 128),
    "stardist3d-demo": (64, 128, 128),
    "care3d-default": (32, 96, 96),
    "stardist3d-default": (32, 96, 96),
}
"""Networks, and the largest block that each is timed on."""
COUNTS: dict[Shape, tuple[int, ...]] = {(16, 32, 32): (1, 2, 4, 8), (32, 64, 64): (1, 2, 4, 8)}
"""Numbers of blocks in a batch, per shape of block; of the largest, 1 and 2."""
OTHER, MIDDLE = (16, 32, 48), (32, 64, 64)
Call = Callable[[np.ndarray], list[np.ndarray]]
"""Takes a batch (block, z, y, x, channel), gives the network's outputs."""
Task = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)


def with_predict(keras_model: Any) -> Call:
    """Return Keras' ``predict``."""
    return lambda batch: _arrays(keras_model.predict(batch, batch_size=len(batch), verbose=0))


def with_predict_on_batch(keras_model: Any) -> Call:
    """Return Keras' ``predict_on_batch``."""
    return lambda batch: _arrays(keras_model.predict_on_batch(batch))


def called_directly(keras_model: Any) -> Call:
    """Return the model itself, run operation by operation."""
    listed = isinstance(keras_model.input, list)
    return lambda batch: _arrays(keras_model([batch] if listed else batch, training=False))


def with_one_graph(keras_model: Any) -> Call:
    """Return what `run_network` calls."""
    return lambda batch: _arrays(network._function(keras_model)(batch))


def with_graph_per_shape(keras_model: Any) -> Call:
    """Return a graph that is traced for every shape anew, and so knows it."""
    import tensorflow as tf

    graph = tf.function(lambda batch: keras_model(batch, training=False), autograph=False, jit_compile=False)
    return lambda batch: _arrays(graph(tf.convert_to_tensor(batch)))


CALLS: dict[str, Callable[[Any], Call]] = {
    "predict": with_predict,
    "predict_on_batch": with_predict_on_batch,
    "direct": called_directly,
    "one_graph": with_one_graph,
    "graph_per_shape": with_graph_per_shape,
}


def compare_calls(loaded: Any, shapes: list[Shape], repeats: int) -> dict[str, Any]:
    """Time every way of calling, each with a network that was never called before."""
    fresh = {name: _fresh(loaded) for name in CALLS}
    calls = {name: make(fresh[name]) for name, make in CALLS.items()}
    results: dict[str, dict[str, Any]] = {name: {"steady": {}} for name in CALLS}
    for name, figures in results.items():
        figures["first_call"] = _timed(_on(calls[name], _blocks(1, shapes[0])))
    for shape in shapes:
        tasks = {name: _on(call, _blocks(1, shape)) for name, call in calls.items()}
        for name, times in _in_turns(tasks, repeats).items():
            results[name]["steady"][str(shape)] = times
    expected = calls["predict"](_blocks(1, shapes[-1]))
    for name, figures in results.items():
        pairs = zip(calls[name](_blocks(1, shapes[-1])), expected, strict=True)
        figures["max_difference_from_predict"] = max(float(np.abs(a - b).max()) for a, b in pairs)
        first, second = (_timed(_on(calls[name], _blocks(1, OTHER))) for _ in range(2))
        figures |= {"first_call_with_new_shape": first, "second_call_with_new_shape": second}
        for kind in ("wall", "cpu"):
            figures[f"predict_over_this_{kind}"] = {
                shape: results["predict"]["steady"][shape][f"{kind}_s"] / times[f"{kind}_s"]
                for shape, times in figures["steady"].items()
            }
    graph = network._function(fresh["one_graph"])
    results["one_graph"]["n_traced"] = graph.experimental_get_tracing_count()
    return results


def compare_batches(loaded: Any, largest: Shape, repeats: int) -> dict[str, Any]:
    """Time blocks in one call of the graph against one by one."""
    call = with_one_graph(_fresh(loaded))
    results: dict[str, Any] = {}
    for shape, counts in (COUNTS | {largest: (1, 2)}).items():
        times = _in_turns({n: _on(call, _blocks(n, shape)) for n in counts}, repeats)
        core = math.prod(max(0, n - 2 * d) for n, d in zip(shape, _depth(loaded), strict=True))
        results[str(shape)] = {
            "core_share_inside_a_volume": core / math.prod(shape),
            "by_n_blocks": {
                str(n): found
                | {
                    f"{k}_per_block_over_alone": found[f"{k}_s"] / n / times[1][f"{k}_s"]
                    for k in ("wall", "cpu")
                }
                | {f"{k}_ns_per_voxel": found[f"{k}_s"] / n / math.prod(shape) * 1e9 for k in ("wall", "cpu")}
                for n, found in times.items()
            },
        }
    return results


def compare_precisions(loaded: Any, shape: Shape, repeats: int) -> dict[str, Any]:
    """Time every precision on one block."""
    fresh, image = _fresh(loaded), _blocks(1, shape)[0]
    tasks = {
        precision: partial(network.run_network, fresh, image, precision=precision)
        for precision in get_args(Precision)
    }
    results: dict[str, Any] = {name: {"first_call": _timed(task)} for name, task in tasks.items()}
    steady = _in_turns(tasks, repeats)
    for name, figures in results.items():
        figures["steady"] = steady[name]
        for kind in ("wall_s", "cpu_s"):
            figures[f"float32_over_this_{kind[:-2]}"] = steady["float32"][kind] / steady[name][kind]
    return {"shape": shape, "by_precision": results}


def care_in_every_precision(shape: Shape) -> dict[str, Any]:
    """Restore a simulated volume in one piece and block by block; differences in units of (high - low)."""
    image = embryo(shape, seed=3, arrangement="tissue").image
    operator = Care("care3d-demo")
    operator = operator.resolve(of_array(image, operator.needs))
    low, high = operator.normalization or (0, 1)
    exact, results = operator(image), {}
    for precision in get_args(Precision):
        reduced = replace(operator, precision=precision)
        whole, tiled = reduced(image), np.empty(shape, np.float32)
        for block in BlockGrid.regular(shape, [-(-n // 2) for n in shape], reduced.halo(shape)):
            tiled[block.core] = reduced(image[block.read], block)[block.trim]
        results[precision] = {
            "untiled_from_float32": _difference(whole / (high - low), exact / (high - low)),
            "tiled_from_untiled": _difference(tiled / (high - low), whole / (high - low)),
        }
    return {"shape": shape, "by_precision": results}


def stardist_in_every_precision(shape: Shape) -> dict[str, Any]:
    """Compare outputs on a simulated volume with float32, and the instances that StarDist makes of them."""
    image = embryo(shape, seed=5, arrangement="tissue").image
    low, high = np.percentile(image, (1, 99.8))
    normalized = ((image - low) / (high - low)).astype(np.float32)
    loaded = models.load("stardist3d-demo")
    exact = network.run_network(loaded.keras_model, normalized[..., np.newaxis])
    results: dict[str, Any] = {}
    instances: dict[str, np.ndarray] = {}
    for precision in get_args(Precision):
        outputs = network.run_network(loaded.keras_model, normalized[..., np.newaxis], precision=precision)
        # A model object of its own, so that the one that is shared keeps its network.
        own = type(loaded)(loaded.config, loaded.name, basedir=None)
        own.thresholds = loaded.thresholds._asdict()
        own.keras_model = in_precision(loaded.keras_model, precision)
        instances[precision] = own.predict_instances(normalized, verbose=False)[0]
        score = metrics.match_instances(instances["float32"], instances[precision])
        results[precision] = {
            "prob": _difference(outputs[0], exact[0]),
            "dist_voxels": _difference(outputs[1], exact[1]),
            "n_instances": score.n_pred,
            "lost": score.fn,
            "extra": score.fp,
            "f1": score.f1,
            "mean_matched_iou": score.mean_matched_iou,
        }
    return {"shape": shape, "by_precision": results}


def loaded_network(name: str) -> Any:
    """Return a CSBDeep or StarDist object: a shipped model, or one of default size with random weights."""
    if name == "care3d-default":
        from csbdeep.models import CARE, Config

        return CARE(Config("ZYX", 1, 1, unet_n_depth=2, unet_n_first=32), name, basedir=None)
    if name == "stardist3d-default":
        from stardist.models import Config3D, StarDist3D

        return StarDist3D(Config3D(rays=96, grid=(1, 2, 2), unet_n_filter_base=32), name, basedir=None)
    return models.load(name)


def _fresh(loaded: Any) -> Any:
    """Return a copy of the Keras model that was never called."""
    return in_precision(loaded.keras_model, "float32")


def _depth(loaded: Any) -> tuple[int, ...]:
    is_stardist = hasattr(loaded.config, "n_rays")
    geometry = network.stardist_geometry if is_stardist else network.care_geometry
    return geometry(loaded.config).depth


def _blocks(n: int, shape: Shape) -> np.ndarray:
    return np.random.default_rng(1).random((n, *shape, 1), np.float32)


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(output) for output in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def _on(call: Call, batch: np.ndarray) -> Task:
    return lambda: call(batch)


def _timed(task: Task) -> dict[str, float]:
    """Return wall seconds, and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _in_turns(tasks: Mapping[Key, Task], repeats: int) -> dict[Key, dict[str, float]]:
    """Return the least seconds of each task; they take turns, so that whatever else runs slows all of them."""
    for task in tasks.values():
        task()
    rounds = [{key: _timed(task) for key, task in tasks.items()} for _ in range(repeats)]
    return {key: {kind: min(r[key][kind] for r in rounds) for kind in ("wall_s", "cpu_s")} for key in tasks}


def _difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    rms = float(np.sqrt(np.mean((a - b) ** 2, dtype=np.float64)))
    return {"max": float(np.abs(a - b).max()), "rms": rms}


def measure(name: str, largest: Shape, repeats: int) -> dict[str, Any]:
    """Return all timings of one network."""
    loaded = loaded_network(name)
    return {
        "n_parameters": loaded.keras_model.count_params(),
        "calls": compare_calls(loaded, [*COUNTS, largest], repeats),
        "batches": compare_batches(loaded, largest, repeats),
        "precisions": compare_precisions(loaded, MIDDLE, min(repeats, 3)),
    }


def main() -> None:
    """Measure, print a summary and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(LARGEST), default=list(LARGEST))
    parser.add_argument("--largest", nargs=3, type=int, help="Largest block; default depends on the network.")
    parser.add_argument("--volume", nargs=3, type=int, default=[64, 128, 128], help="For the precisions.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    models.tensorflow()
    with_one_graph(loaded_network("care3d-demo").keras_model)(_blocks(1, OTHER))
    results: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment.describe(),
    }
    results["networks"] = {}
    for name in options.networks:
        largest = tuple(options.largest or LARGEST[name])
        results["networks"][name] = found = measure(name, largest, options.repeats)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        for call, figures in found["calls"].items():
            ratios = {shape: round(ratio, 2) for shape, ratio in figures["predict_over_this_wall"].items()}
            print(f"{name:20} {call:18} predict takes {ratios} times its wall seconds", flush=True)
    volume = tuple(options.volume)
    results["reduced_precision"] = {
        "care3d-demo": care_in_every_precision(volume),
        "stardist3d-demo": stardist_in_every_precision(volume),
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
