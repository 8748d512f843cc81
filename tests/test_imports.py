"""The structure of the package: what may be loaded when, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import chunkrestore

PACKAGE = Path(chunkrestore.__file__).parent
HEAVY = (
    *("tensorflow", "keras", "csbdeep", "stardist", "cupy", "zarr", "obstore", "distributed", "skimage"),
    *("tensorstore", "zarrs"),
    *("matplotlib", "numba", "pyarrow", "tifffile", "napari", "anndata", "pandas", "h5py"),
)

LAYERS = [
    {"grid", "backend", "hashing"},
    {"statistics", "gathering"},
    {"kernels", "psf", "models", "keras_files", "simulate", "metrics"},
    {"operators"},
    {"lazy", "lazy_labels", "lazy_resampled", "stitch"},
    {"api", "pipeline", "pipeline_steps", "jobs", "train"},
    {"demo", "doctor", "viewer", "comparison"},
    {path.stem for path in PACKAGE.glob("cli*.py")},
]
BESIDE = {"ome_zarr", "cluster", "models", "keras_files", "simulate", "metrics"}
"""Know no operator."""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def storey(name):
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def test_imports_run_downwards_only():
    wrong = []
    for path, tree in modules():
        own = storey(part_of(path))
        for module in imported(tree):
            parts = module.split(".")
            if parts[0] != "chunkrestore" or len(parts) < 2 or own is None:
                continue
            other = storey(parts[1])
            if other is not None and other > own:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_stores_clusters_and_models_know_no_operator():
    above = {"operators", "lazy", "stitch", "api", "jobs", "cli", "pipeline"}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, tree in modules()
        if part_of(path) in BESIDE
        for module in imported(tree)
        if module.split(".")[0] == "chunkrestore" and {*module.split(".")[1:2]} & above
    ]
    assert not wrong


def test_foreign_systems_are_named_in_one_place():
    homes = {
        "cupy": {"backend"},
        "cupyx": {"backend"},
        "distributed": {"cluster", "jobs"},
        "dask_jobqueue": {"cluster"},
        "dask_cuda": {"cluster"},
        "zarr": {"ome_zarr"},
        "obstore": {"ome_zarr"},
        "tifffile": {"ome_zarr", "psf", "demo"},
        "pyarrow": {"jobs", "viewer"},
        "napari": {"viewer"},
        "anndata": {"jobs"},
    }
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, tree in modules()
        for module in imported(tree)
        if module.split(".")[0] in homes and part_of(path) not in homes[module.split(".")[0]]
    ]
    assert not wrong


def loaded_by(code):
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import chunkrestore") == []


def test_help_loads_nothing_heavy():
    code = (
        "from chunkrestore.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as error:\n    assert error.code == 0"
    )
    assert loaded_by(code) == []


def test_every_public_name_exists():
    for name in ("grid", "statistics", "api"):
        __import__(f"chunkrestore.{name}")
    light = [
        name for name in chunkrestore.__all__ if name in {"deconvolve", "restore", "segment", "percentiles"}
    ]
    assert all(callable(getattr(chunkrestore, name)) for name in light)
    assert set(chunkrestore.__all__) <= set(dir(chunkrestore))
