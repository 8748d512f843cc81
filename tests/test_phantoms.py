"""Phantoms: the same voxels for every cutting, objects that are what they claim to be, in bounded memory."""

import json
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, spatial

from chunkrestore.simulate import Beads, Embryo, Filaments, Nuclei, Spheres, Tissue, embryo, from_description
from chunkrestore.simulate.hashing import Purpose, uniform
from chunkrestore.simulate.lattice import assemble, cell_rng
from chunkrestore.simulate.painting import paint
from chunkrestore.simulate.placement import COLOURS, Placement, Spacing, packed

SHAPE = (50, 90, 71)
WHOLE = (slice(None),) * 3
SMALL = Nuclei(radius=(3, 5))
ODD = Nuclei(
    radius=(2, 6),
    elongation=(1, 3),
    flattening=(0.5, 1.5),
    spacing=0.7,
    texture=0.6,
    grain=3,
    dents=0.12,
    mitotic=0.2,
)
PHANTOMS = {
    "embryo": Embryo(SHAPE, 4, SMALL),
    "tissue": Tissue(SHAPE, 4, ODD),
    "spheres": Spheres(SHAPE, 4, radius=(2, 7)),
    "overlapping spheres": Spheres(SHAPE, 4, radius=(2, 5), spacing=0.7, crowding=10),
    "points": Beads(SHAPE, 4, density=500, spacing=0),
    "beads": Beads(SHAPE, 4, density=300, radius=2.5, spacing=8),
    "filaments": Filaments(SHAPE, 4, density=60),
}


@pytest.fixture(scope="module")
def volumes():
    return {name: phantom.render(WHOLE) for name, phantom in PHANTOMS.items()}


def regions(shape):
    bounds = [st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda b: b[0] != b[1]) for n in shape]
    return st.tuples(*(b.map(lambda b: slice(min(b), max(b))) for b in bounds))


# The same voxels for every cutting ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHANTOMS)
@settings(max_examples=15, deadline=None)
@given(region=regions(SHAPE))
def test_any_region_has_the_voxels_of_the_whole_bit_by_bit(volumes, name, region):
    for part, whole in zip(PHANTOMS[name].render(region), volumes[name], strict=True):
        assert part.dtype == whole.dtype
        np.testing.assert_array_equal(part, whole[region])


@pytest.mark.parametrize("name", PHANTOMS)
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**40), cuts=st.tuples(*(st.sets(st.integers(1, n - 1), max_size=1) for n in SHAPE))
)
def test_any_cutting_gives_the_same_volume_for_every_seed(name, seed, cuts):
    phantom = replace(PHANTOMS[name], seed=seed)
    labels, photons = phantom.render(WHOLE)
    ends = [[0, *sorted(c), n] for c, n in zip(cuts, SHAPE, strict=True)]
    for z, y, x in np.ndindex(*(len(e) - 1 for e in ends)):
        region = tuple(slice(e[i], e[i + 1]) for e, i in zip(ends, (z, y, x), strict=True))
        part = phantom.render(region)
        np.testing.assert_array_equal(part[0], labels[region])
        np.testing.assert_array_equal(part[1], photons[region])


@pytest.mark.parametrize("name", PHANTOMS)
def test_seeds_differ(volumes, name):
    labels, photons = replace(PHANTOMS[name], seed=5).render(WHOLE)
    assert not np.array_equal(labels > 0, volumes[name][0] > 0)
    assert not np.array_equal(photons, volumes[name][1])


def test_the_lattice_assembles_any_region_from_whole_cells():
    shape = (70, 130)

    def noise(cell, own):
        return cell_rng(1, 2, cell).normal(size=[part.stop - part.start for part in own])

    whole = assemble((slice(None), slice(None)), shape, noise)
    assert whole.shape == shape
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(assemble((slice(3, 69), slice(60, 129)), shape, noise), whole[3:69, 60:129])
    for outside in [(slice(0, 71), slice(0, 9)), (slice(5, 5), slice(0, 9)), (slice(0, 9),)]:
        with pytest.raises(ValueError, match="`region`"):
            assemble(outside, shape, noise)


def test_a_region_of_a_volume_far_larger_than_memory_is_that_of_any_other_cutting(tracemalloc_peak):
    beads = Beads((100_000,) * 3, 6, density=1.0)
    filaments = Filaments((100_000,) * 3, 6, density=1.0, length=300)
    thin = Tissue((64, 40_000, 60_000), 6)
    for phantom, corner in ((beads, 70_000), (filaments, 70_000), (thin, 0)):
        box = tuple(slice(a, a + 64) for a in (corner, 31_000, 39_000))
        wide = tuple(slice(part.start, part.start + 64 + 9 * i) for i, part in enumerate(box))
        labels, photons = phantom.render(box)
        again = phantom.render(wide)
        np.testing.assert_array_equal(again[0][:, :64, :64], labels)
        np.testing.assert_array_equal(again[1][:, :64, :64], photons)
    assert labels.max() > 2**20
    assert (labels > 0).mean() > 0.3
    assert tracemalloc_peak() < 64e6


@pytest.fixture
def tracemalloc_peak():
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


# Where objects are -------------------------------------------------------------------------------------------


def one_after_the_other(candidates, spacing):
    """Return the keys that random sequential packing keeps, candidate by candidate, over the whole volume."""
    cells = np.stack(np.meshgrid(*map(np.arange, candidates.grid), indexing="ij"), -1).reshape(-1, 3)
    keys, centres = candidates.tried(cells)
    scaled, radii = centres / np.array(spacing.scale), spacing.radii(keys)
    colours = [COLOURS.index(tuple(cell % 2)) for cell in candidates.cells_of(keys)]
    kept = []
    for i in np.lexsort((keys, colours)):
        distances = np.linalg.norm(scaled[kept] - scaled[i], axis=1)
        if not (distances < spacing.factor * (radii[kept] + radii[i])).any():
            kept.append(i)
    return sorted(keys[kept])


@pytest.mark.parametrize("seed", [1, 2])
def test_packing_region_by_region_is_packing_one_after_the_other(seed):
    nuclei = Nuclei(radius=(3, 6), flattening=(0.5, 0.7))
    candidates = nuclei.candidates((30, 70, 110), seed)
    scale = (0.6, 1.0, 1.0)
    spacing = Spacing(lambda keys: nuclei.radii(seed, keys), nuclei.spacing, scale)
    expected = one_after_the_other(candidates, spacing)
    found = set()
    for start in range(0, 110, 10):
        region = (slice(0, 30), slice(20, 60), slice(start, start + 10))
        placement = packed(candidates, region, 0.0, spacing)
        around = [
            np.floor((part.start) / e) * e - 0.5 for part, e in zip(region, candidates.edge, strict=True)
        ]
        assert (placement.centres >= around).all()
        found |= set(placement.keys.tolist())
        assert found <= set(expected)
        inside = ((placement.centres >= [0, 20, start]) & (placement.centres < [30, 60, start + 10])).all(
            axis=1
        )
        assert inside.any()
    whole = packed(candidates, (slice(0, 30), slice(0, 70), slice(0, 110)), 0.0, spacing)
    assert whole.keys.tolist() == expected


def test_no_two_nuclei_are_closer_than_the_spacing_allows_and_few_gaps_remain():
    tissue = Tissue((80, 90, 100), 7, Nuclei(mitotic=0.2))
    placement = tissue.placement(WHOLE)
    radii = tissue.nuclei.radii(7, placement.keys)
    scaled = placement.centres / [0.9, 1, 1]
    pairs = spatial.cKDTree(scaled).query_pairs(2 * 0.88 * 9, output_type="ndarray")
    distances = np.linalg.norm(scaled[pairs[:, 0]] - scaled[pairs[:, 1]], axis=1)
    ratio = distances / radii[pairs].sum(axis=1)
    assert 0.88 <= ratio.min() < 0.89
    assert len(np.unique(placement.ids)) == len(placement.ids)
    # Random sequential packing of spheres ends at 38 % of the volume; scaled ones of several sizes pass that.
    assert (4 / 3 * np.pi * (0.88 * radii) ** 3).sum() / (
        scaled.max(axis=0) - scaled.min(axis=0)
    ).prod() > 0.33


def test_hashed_numbers_are_uniform_and_independent():
    numbers = uniform(3, Purpose.PLACES, np.arange(200_000), 3)
    other = uniform(4, Purpose.PLACES, np.arange(200_000), 3)
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers[:, 0], 50, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100
    columns = [numbers[:-1, 0], numbers[:-1, 1], numbers[:-1, 2], numbers[1:, 0], other[:-1, 0]]
    correlation = np.corrcoef(columns) - np.eye(5)
    assert abs(correlation).max() < 5 / np.sqrt(200_000)
    np.testing.assert_array_equal(
        uniform(3, Purpose.PLACES, np.array([[77], [5]]), 3)[:, 0], numbers[[77, 5]]
    )


def test_more_candidates_than_ids_are_refused():
    with pytest.raises(ValueError, match="ids are positive int32"):
        Embryo((20_000,) * 3, 1)


# What objects look like ----------------------------------------------------------------------------------------


def test_a_nucleus_does_not_depend_on_its_neighbours():
    tissue = PHANTOMS["tissue"]
    placement = tissue.placement(WHOLE)
    region = tuple(slice(0, n) for n in SHAPE)
    labels, photons = tissue.render(region)
    for row in range(0, len(placement.keys), 40):
        alone = Placement(placement.keys[[row]], placement.centres[[row]])
        own, light = paint(region, tissue.nuclei.draw(4, alone, region))
        shown = labels == alone.ids[0]
        assert (own[shown] == alone.ids[0]).all()
        np.testing.assert_array_equal(photons[shown], light[shown])


def test_classes_are_those_of_the_nuclei_and_mitotic_ones_are_bright():
    phantom = Tissue(SHAPE, 4, replace(SMALL, mitotic=0.3))
    labels, photons = phantom.render(WHOLE)
    classes = phantom.render_classes(WHOLE)
    np.testing.assert_array_equal(classes > 0, labels > 0)
    ids = np.unique(labels[labels > 0])
    # Three in ten of those tried, and small ones fit more often.
    assert 0.3 < (phantom.class_of(ids) == 2).mean() < 0.55
    assert all(len(np.unique(classes[labels == i])) == 1 for i in ids[::20])
    assert photons[classes == 2].mean() > 1.7 * photons[classes == 1].mean()
    region = np.s_[10:30, 5:80, 33:40]
    np.testing.assert_array_equal(phantom.render_classes(region), classes[region])


def test_an_embryo_is_crowded_in_its_shell_sparse_inside_and_dark_outside():
    phantom = Embryo((120, 120, 120), 2, SMALL, clusters=0)
    labels, photons = phantom.render(WHOLE)
    axes = [(np.arange(120) - 59.5) / 54] * 3
    rho = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    depth = (1 - rho) * 54
    mask = labels > 0
    assert mask[(depth > 1) & (depth < 7)].mean() > 0.4
    assert 0.02 < mask[depth > 20].mean() < 0.2
    assert not mask[depth < -8].any()
    assert not photons[depth < -8].any()
    glow = np.float32(0.08 * 4)
    assert (photons[depth > 4] >= glow).all()
    assert (photons[depth > 20] == glow).mean() > 0.7


def test_spheres_have_the_volume_and_the_light_that_they_claim():
    phantom = Spheres((90, 90, 90), 3, radius=(3, 10), photons=(5, 40), spacing=1.2, crowding=1.0)
    labels, photons = phantom.render(WHOLE)
    placement = phantom.placement(WHOLE)
    radii = phantom.radius_of(placement.keys)
    inside = ((placement.centres > radii[:, None] + 1) & (placement.centres < 88 - radii[:, None])).all(
        axis=1
    )
    assert inside.sum() > 15
    assert np.ptp(radii[inside]) > 3
    light = []
    for id_, centre, radius in zip(
        placement.ids[inside], placement.centres[inside], radii[inside], strict=True
    ):
        volume = 4 / 3 * np.pi * radius**3
        voxels = np.argwhere(labels == id_)
        # The error of counting lattice points grows as the surface to the power of about a half.
        assert len(voxels) == pytest.approx(volume, abs=3 * np.sqrt(4 * np.pi * radius**2))
        assert np.abs(voxels.mean(axis=0) - centre).max() < 0.2
        box = tuple(slice(int(c - radius - 1), int(c + radius + 3)) for c in centre)
        own = photons[box] * ((labels[box] == id_) | (labels[box] == 0))
        light.append(photons[labels == id_].max())
        near = np.linalg.norm(np.argwhere(np.ones(own.shape)) + [b.start for b in box] - centre, axis=1)
        shell = own.reshape(-1) * (near < radius + 0.5)
        # Half a voxel of the surface is shared out linearly: right to second order in 1 / radius.
        assert shell.sum() / light[-1] == pytest.approx(volume, rel=0.02 + 0.5 / radius**2)
    assert 5 <= min(light) < 20 < 30 < max(light) <= 40


def test_spheres_at_spacing_one_never_overlap_and_cut_each_other_below():
    apart = Spheres(SHAPE, 4, radius=(2, 5), spacing=1.0, crowding=10)
    for phantom, overlaps in ((apart, False), (PHANTOMS["overlapping spheres"], True)):
        placement = phantom.placement(WHOLE)
        radii = phantom.radius_of(placement.keys)
        pairs = spatial.cKDTree(placement.centres).query_pairs(10, output_type="ndarray")
        distances = np.linalg.norm(placement.centres[pairs[:, 0]] - placement.centres[pairs[:, 1]], axis=1)
        assert (distances < radii[pairs].sum(axis=1)).any() == overlaps
        assert (distances >= phantom.spacing * radii[pairs].sum(axis=1)).all()


@pytest.mark.parametrize("name", ["points", "beads"])
def test_beads_hold_all_their_light_around_their_centre(volumes, name):
    phantom, (labels, photons) = PHANTOMS[name], volumes[name]
    placement = phantom.placement(WHOLE)
    light = phantom.photons_of(placement.keys)
    assert len(light) > 10
    assert photons.sum(dtype=float) == pytest.approx(light.sum(), rel=1e-6)
    assert set(np.unique(labels)) - {0} <= set(placement.ids)
    nearest = spatial.cKDTree(placement.centres).query(placement.centres, 2)[0][:, 1]
    assert nearest.min() >= phantom.spacing
    reach = int(phantom.radius) + 3
    checked = 0
    for centre, total in zip(placement.centres[nearest > 3 * reach], light[nearest > 3 * reach], strict=True):
        box = tuple(slice(max(int(c) - reach, 0), int(c) + reach + 2) for c in centre)
        own = photons[box].astype(float)
        positions = np.stack(np.indices(own.shape), -1) + [part.start for part in box]
        assert own.sum() == pytest.approx(total, rel=1e-6)
        np.testing.assert_allclose(
            (own[..., None] * positions).sum(axis=(0, 1, 2)) / total, centre, atol=1e-4
        )
        variance = (own[..., None] * (positions - centre) ** 2).sum() / total
        # Of a ball 3/5 radius^2, and of sharing out between voxels at most a quarter per axis.
        assert 0.5 * phantom.radius**2 < variance < 0.65 * phantom.radius**2 + 0.75
        checked += 1
    assert checked > 3


def test_filaments_have_their_thickness_and_are_one_piece_within_their_reach(volumes):
    phantom = replace(PHANTOMS["filaments"], density=4, radius=(1.5, 3.0), length=80)
    shape = (150, 150, 150)
    phantom = replace(phantom, shape=shape)
    labels, photons = phantom.render(WHOLE)
    placement = phantom.placement(WHOLE)
    checked = 0
    for id_, middle in zip(placement.ids, placement.centres, strict=True):
        points = phantom.curve(int(id_) - 1, middle)
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        assert steps.max() <= 1
        assert np.linalg.norm(points - middle, axis=1).max() <= 40
        if not ((points > 5) & (points < 144)).all():
            continue
        mask = labels == id_
        if not mask.any():
            continue
        distances = spatial.cKDTree(points).query(np.argwhere(mask))[0]
        radius = 1.5 + 1.5 * uniform(phantom.seed, Purpose.CURVES, np.array([id_ - 1]), 58)[0, 0]
        assert distances.max() < radius + 0.2
        crossed = (spatial.cKDTree(np.argwhere((labels > 0) & ~mask)).query(points)[0] < 8).any()
        if not crossed:
            assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1
            volume = np.pi * radius**2 * steps.sum() + 4 / 3 * np.pi * radius**3
            assert mask.sum() == pytest.approx(volume, rel=0.05)
            assert photons[mask].max() <= 20
            checked += 1
    assert checked >= 2


# Descriptions and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_description_makes_the_same_phantom_again(name):
    phantom = PHANTOMS[name]
    assert from_description(json.loads(json.dumps(phantom.describe()))) == phantom
    assert pickle.loads(pickle.dumps(phantom)) == phantom


def test_a_volume_in_memory_is_the_phantom():
    volume = embryo(SHAPE, seed=4, nuclei=SMALL)
    labels, photons = PHANTOMS["embryo"].render(WHOLE)
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_array_equal(volume.truth, photons)
    assert volume.n_nuclei == len(np.unique(labels)) - 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Embryo((64, 64), 1), "shape"),
        (lambda: Tissue(SHAPE, -1), "seed"),
        (lambda: Embryo(SHAPE, 1, sparse=2), "sparse"),
        (lambda: Nuclei(grain=0), "grain"),
        (lambda: Nuclei(dents=0.3), "dents"),
        (lambda: Spheres(SHAPE, 1, radius=(0.5, 3)), "radius"),
        (lambda: Spheres(SHAPE, 1, photons=(5, 3)), "photons"),
        (lambda: Spheres(SHAPE, 1, crowding=0), "crowding"),
        (lambda: Beads(SHAPE, 1, radius=5), "radius"),
        (lambda: Beads(SHAPE, 1, density=0), "density"),
        (lambda: Beads((8, 64, 64), 1, radius=3), "shape"),
        (lambda: Filaments(SHAPE, 1, length=1), "length"),
        (lambda: Filaments(SHAPE, 1, bending=-1), "bending"),
        (lambda: Tissue(SHAPE, 1).render((slice(0, 9), slice(0, 9), slice(0, 72))), "region"),
        (lambda: from_description({"kind": "Cat"}), "kind"),
        (lambda: from_description({"kind": "Beads", "shape": SHAPE, "seed": 1, "colour": 3}), "colour"),
    ],
)
def test_impossible_phantoms_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()
