"""Aspect-ratio buckets: sizes, assignment, and the order that they make."""

from collections import Counter

import numpy as np
import pytest
from drawn_pictures import encoded, plain, texture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu35.errors import DataError
from emu35.vision.pictures import AspectPictures, PictureBatches, Rejects, find_pictures, store
from emu35.vision.pictures.buckets import RATIOS, BucketPlan, assign, make_buckets

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(codes=st.integers(4, 128), factor=st.sampled_from([4, 8, 16]), piece=st.floats(0.25, 1.0))
def test_sizes_are_multiples_of_about_the_same_area(codes, factor, piece):
    resolution, crop = codes * factor, max(4, int(codes * piece)) * factor
    for bucket in make_buckets(resolution=resolution, factor=factor, crop=min(crop, resolution)):
        sides = (bucket.width, bucket.height, bucket.crop_width, bucket.crop_height)
        assert all(side % factor == 0 and side > 0 for side in sides)
        tolerance = 1 + 0.75 / codes  # less than a notch along one side
        assert 1 / tolerance <= bucket.width * bucket.height / resolution**2 <= tolerance
        assert bucket.crop_width <= bucket.width
        assert bucket.crop_height <= bucket.height


def test_every_ratio_has_its_bucket_and_its_mirror_image():
    buckets = make_buckets(resolution=256, factor=16)
    sizes = {(bucket.width, bucket.height) for bucket in buckets}
    assert len(sizes) == len(RATIOS)
    assert sizes == {(height, width) for width, height in sizes}
    for bucket, (wide, high) in zip(buckets, RATIOS, strict=True):
        assert bucket.width / bucket.height == pytest.approx(wide / high, rel=0.08)


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_a_picture_goes_where_least_of_it_is_cut(width, height):
    buckets = make_buckets(resolution=256, factor=16)
    (chosen,) = assign(np.array([[width, height]]), buckets=buckets)

    def lost(bucket):
        return abs(np.log(width / height * bucket.height / bucket.width))

    assert lost(buckets[chosen]) <= min(map(lost, buckets)) + 1e-6


def samples(plan: BucketPlan, count: int) -> list[tuple[int, int]]:
    places = [plan.place(sample) for sample in range(count)]
    return [(place.bucket, place.member) for place in places]


@given(counts=COUNTS, group=st.integers(1, 7), seed=st.integers(0, 9))
def test_a_group_has_one_bucket(counts, group, seed):
    found = samples(BucketPlan(counts, group=group, seed=seed), 12 * group)
    for first in range(0, len(found), group):
        assert len({bucket for bucket, _ in found[first : first + group]}) == 1


@given(counts=COUNTS, group=st.integers(1, 7), epochs=st.integers(1, 4))
def test_nothing_is_lost_and_nothing_comes_early(counts, group, epochs):
    """After any epoch a picture was used in every epoch, or is among the fewer than ``group`` of
    its bucket that open the next one."""
    plan = BucketPlan(counts, group=group, seed=3)
    used = Counter(samples(plan, plan.groups_before(epochs) * group))
    for bucket, count in enumerate(counts):
        times = [used[bucket, member] for member in range(count)]
        assert sum(times) == epochs * count // group * group
        assert epochs * count - sum(times) < group
        assert all(t <= epochs for t in times)
        assert max(times, default=0) - min(times, default=0) <= 1 + (group - 1) // max(count, 1)


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), group=st.integers(1, 5)
)
def test_every_picture_comes_once_an_epoch_where_groups_come_out_even(groups, group):
    counts = [number * group for number in groups]
    found = samples(BucketPlan(counts, group=group, seed=1), 2 * sum(counts))
    everyone = {(bucket, m) for bucket, count in enumerate(counts) for m in range(count)}
    first, second = found[: sum(counts)], found[sum(counts) :]
    assert set(first) == set(second) == everyone


def test_epochs_and_seeds_have_their_own_order():
    one, other = (samples(BucketPlan([40, 40], group=4, seed=s), 160) for s in (1, 2))
    assert one != other
    assert one[:80] != one[80:]
    buckets = [bucket for bucket, _ in one[:80:4]]
    assert buckets != sorted(buckets)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pictures of many shapes in a folder, and their sizes in the order of the listing."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = [(60, 60), (80, 60), (60, 80), (120, 60), (200, 60), (64, 64), (90, 60), (30, 300)]
    sizes = [*sizes, *sizes, (61, 60), (60, 61), (85, 60)]
    for number, (width, height) in enumerate(sizes):
        image = texture(number, width=width, height=height)
        (folder / f"{number:02d}.png").write_bytes(encoded(image))
    return folder, np.array(sizes)


def open_aspect(shapes, *, group=2, rejects=None, **options) -> AspectPictures:
    folder, sizes = shapes
    rejects = Rejects() if rejects is None else rejects
    return AspectPictures(
        find_pictures([folder], rejects=rejects),
        sizes_N2=sizes,
        resolution=32,
        factor=8,
        seed=5,
        rejects=rejects,
        group=group,
        **options,
    )


def test_micro_batches_have_one_size_and_keep_shapes(shapes):
    pictures = open_aspect(shapes)
    batches = PictureBatches(
        pictures, global_batch_size=6, rank=0, ranks=1, micro_batch_size=2, threads=3
    )
    seen = set()
    for step in range(1, 9):
        found = batches.micro_batches(step)
        assert [len(batch) for batch in found] == [2, 2, 2]
        seen |= {batch.shape[2:] for batch in found}
    batches.close()
    assert seen == {(height, width) for width, height in pictures.counts}
    assert len(seen) >= 4
    assert sum(pictures.counts.values()) == len(pictures)


@settings(max_examples=8, deadline=None)
@given(step=st.integers(1, 60), ranks=st.sampled_from([2, 4]), micro=st.sampled_from([1, 2]))
def test_ranks_and_smaller_micro_batches_share_one_sequence(shapes, step, ranks, micro):
    whole = PictureBatches(
        open_aspect(shapes, crop=24, flip=0.5),
        global_batch_size=8,
        rank=0,
        ranks=1,
        micro_batch_size=2,
    )
    wanted = [picture for batch in whole.micro_batches(step) for picture in batch]
    whole.close()
    found = []
    for rank in range(ranks):
        part = PictureBatches(
            open_aspect(shapes, crop=24, flip=0.5),
            global_batch_size=8,
            rank=rank,
            ranks=ranks,
            micro_batch_size=micro,
            threads=2,
        )
        found += [picture for batch in part.micro_batches(step) for picture in batch]
        part.close()
    assert len(found) == len(wanted) == 8
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_run_can_begin_at_any_step(shapes):
    options = {"global_batch_size": 6, "rank": 0, "ranks": 1, "micro_batch_size": 2, "threads": 2}
    whole = PictureBatches(open_aspect(shapes, flip=0.5), **options)
    steps = {step: whole.micro_batches(step) for step in range(1, 15)}
    whole.close()
    for start in (2, 7, 13):
        resumed = PictureBatches(open_aspect(shapes, flip=0.5), **options)
        for step in range(start, 15):
            for ours, theirs in zip(resumed.micro_batches(step), steps[step], strict=True):
                assert np.array_equal(ours, theirs)
        resumed.close()


def test_pictures_are_cut_and_not_squeezed(tmp_path):
    """A ramp from left to right keeps its slope: the middle of what the bucket cannot show."""
    ramp = np.zeros((60, 80, 3), dtype=np.uint8)
    ramp[:, :] = (np.arange(80) * 3)[:, None]
    (tmp_path / "ramp.png").write_bytes(encoded(Image.fromarray(ramp)))
    pictures = open_aspect((tmp_path, np.array([[80, 60]])), group=1)
    picture = pictures.sample(0)
    assert picture.shape == (3, 24, 40)  # 4:3 is 40 x 24 in multiples of 8, wider than the picture
    slope = (float(picture[0, 12, 35]) - float(picture[0, 12, 5])) / 30
    assert slope == pytest.approx(3 * 80 / 40, rel=0.05)


def test_broken_pictures_are_replaced_within_their_bucket(shapes, tmp_path):
    folder, sizes = shapes
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "01.png").write_bytes((folder / "01.png").read_bytes()[:200])
    rejects = Rejects()
    pictures = open_aspect((tmp_path, sizes), rejects=rejects, group=1)
    healthy = open_aspect(shapes, group=1)
    different = 0
    for sample in range(2 * len(pictures)):
        ours, theirs = pictures.sample(sample), healthy.sample(sample)
        assert ours.shape == theirs.shape
        different += not np.array_equal(ours, theirs)
    assert different == 2  # once an epoch
    assert list(rejects.reasons) == [str(tmp_path / "01.png")]


@pytest.fixture
def lonely(tmp_path):
    """Eight wide pictures, plain ones of levels 0, 20, .. 140, two upright ones of 200, and one
    panorama whose header is all that is left."""
    sizes = [(80, 60)] * 8 + [(60, 80)] * 2 + [(300, 60)]
    for number, (width, height) in enumerate(sizes):
        level = 20 * number if number < 8 else 200
        (tmp_path / f"{number:02d}.png").write_bytes(plain(level, width=width, height=height))
    panorama = encoded(texture(0, width=300, height=60))
    (tmp_path / "10.png").write_bytes(panorama[: len(panorama) // 2])
    return tmp_path, np.array(sizes)


def test_the_nearest_shape_stands_in_for_a_bucket_of_broken_pictures(lonely):
    folder, _ = lonely
    rejects = Rejects()
    pictures = open_aspect(lonely, rejects=rejects)
    found = [pictures.sample(sample) for sample in range(20 * len(pictures))]
    for first in range(0, len(found), 2):
        assert found[first].shape == found[first + 1].shape
    (panorama,) = [(w, h) for (w, h), count in pictures.counts.items() if count == 1]
    at = [place for place, picture in enumerate(found) if picture.shape[:0:-1] == panorama]
    levels = {int(found[place][0, 0, 0]) for place in at}
    assert len(at) == 20
    assert len(levels) > 4  # not one picture again and again
    assert levels <= set(range(0, 160, 20))  # wide, not upright
    assert set(rejects.reasons) == {
        str(folder / "10.png"),
        f"bucket {panorama[0]}x{panorama[1]}",
    }
    assert "none of its 1 pictures" in rejects.reasons[f"bucket {panorama[0]}x{panorama[1]}"]
    resumed = open_aspect(lonely)
    for place in reversed(at):
        assert np.array_equal(resumed.sample(place), found[place])


def test_too_many_broken_pictures_end_a_run_that_others_could_stand_in_for(lonely, monkeypatch):
    folder, sizes = lonely
    monkeypatch.setattr(store, "TOLERATED_REJECTS", 3)
    for number in (0, 1, 2, 8, 9):
        (folder / f"{number:02d}.png").write_bytes(plain(3)[:60])
    pictures = open_aspect((folder, sizes))
    with pytest.raises(DataError, match=r"4 of \d+ pictures cannot be used"):
        list(map(pictures.sample, range(40)))


def test_nothing_usable_in_any_bucket_is_an_error(tmp_path):
    (tmp_path / "bad.png").write_bytes(plain(3)[:60])
    with pytest.raises(DataError, match="none of the 1 pictures"):
        open_aspect((tmp_path, np.array([[40, 40]])), group=1).sample(0)


def test_identity_tells_shapes_and_groups_apart(shapes):
    one = open_aspect(shapes)
    folder, sizes = shapes
    turned = open_aspect((folder, sizes[:, ::-1]))
    identities = [one.identity, turned.identity, open_aspect(shapes, group=3).identity]
    assert len(set(identities)) == 3
    assert open_aspect(shapes).identity == one.identity
