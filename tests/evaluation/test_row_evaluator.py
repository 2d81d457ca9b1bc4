"""Rows are decoded ahead in their order, images of one size are evaluated together, and batches grow by trial."""

import importlib.util
import itertools
import threading
import warnings

import pytest
import torch
from image_folders import image_folder

from diffusers_fisher import InputError
from diffusers_fisher.data import ImageData, open_images, without_pillow_warnings
from diffusers_fisher.evaluation.execution import GAIN, TRIALS, BatchSizeTrial, Execution, parse_batch_size
from diffusers_fisher.evaluation.ray_engine import import_ray
from diffusers_fisher.evaluation.row_evaluator import RowEvaluator, run_ahead
from diffusers_fisher.jobs.pipelines import check_offload, named_device


def test_items_are_read_ahead_in_order_and_no_further():
    seen, both = [], threading.Barrier(2, timeout=10)

    def read():
        for number in range(20):
            seen.append(number)
            yield number

    def double(number):
        if number < 2:
            both.wait()  # two threads are here at once
        return 2 * number

    results = run_ahead(read(), double, threads=2, ahead=lambda: 4)
    assert next(results) == 0 and len(seen) <= 4
    assert [*itertools.islice(results, 5)] == [2, 4, 6, 8, 10] and len(seen) <= 9
    results.close()
    assert len(seen) <= 10 and threading.active_count() < 10


def test_errors_of_the_reader_and_of_the_function_come_at_their_place():
    def read():
        yield from (1, 0)
        raise OSError("the disk is gone")

    with pytest.raises(ZeroDivisionError):
        list(run_ahead(read(), lambda number: 1 / number, 1, lambda: 3))
    results = run_ahead(read(), lambda number: number, 1, lambda: 3)
    assert [next(results), next(results)] == [1, 0]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_warnings_of_pillow_alone_are_silenced_in_threads():
    def warn_of_pillow():
        warnings.warn_explicit("damaged tags", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")

    before = list(warnings.filters)
    with without_pillow_warnings():
        thread = threading.Thread(target=warn_of_pillow)
        thread.start()
        thread.join()
        with pytest.warns(UserWarning, match="of the run"):
            warnings.warn("of the run", stacklevel=1)
    assert list(warnings.filters) == before


def sizes_of_batches(folder, sizes, batch_size, **data):
    """Returns the sizes of the images of every batch; None for one that can't be read."""
    for number, size in enumerate(sizes):
        image_folder(folder / f"{number:02d}", 1, size or (8, 8), corrupt=() if size else (0,))
        (folder / f"{number:02d}" / "metadata.jsonl").unlink()
    images = open_images(ImageData(str(folder), **data))
    rows = RowEvaluator(None, images, batch_size, 1)  # no image is evaluated here
    decoded = (rows.decode((position, images.rows[position])) for position in range(len(images)))
    return [
        [row.example and tuple(row.example.pixels.shape[:0:-1]) for row in batch] for batch in rows._batches(decoded)
    ]


def test_images_of_several_sizes_are_evaluated_in_groups(tmp_path):
    wide, high, bad = (16, 8), (8, 16), None
    batches = sizes_of_batches(tmp_path, [wide, high, wide, bad, high, wide], 2)
    assert batches == [[wide] * 2, [high] * 2, [bad], [wide]]


def test_few_images_wait_for_others_of_their_size(tmp_path):
    sizes = [(8 * number, 8) for number in range(1, 7)]
    assert sizes_of_batches(tmp_path / "count", [*sizes, sizes[0]], 1) == [[size] for size in [*sizes, sizes[0]]]
    assert sizes_of_batches(tmp_path / "memory", [(8, 8)] * 5, 4, max_pixels=128) == [[(8, 8)] * 2] * 2 + [[(8, 8)]]
    waiting = sizes_of_batches(tmp_path / "window", [(8, 8)] + [(8 * n, 8) for n in range(2, 10)] + [(8, 8)], 2)
    assert waiting[0] == [(8, 8)]  # the ninth image that waits makes the first size go


def test_a_batch_size_is_found_by_trial():
    trial = BatchSizeTrial("auto")
    seconds_per_image = {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.4 / (GAIN - 0.01)}
    sizes = []
    for _ in range(12):
        sizes.append(trial.size)
        trial.note(trial.size, seconds_per_image[trial.size] * trial.size, out_of_memory=False)
    assert sizes == [1] * TRIALS + [2] * TRIALS + [4] * TRIALS + [8] * TRIALS + [4] * 4


def test_a_batch_size_shrinks_for_good_where_memory_is_short():
    trial = BatchSizeTrial("auto")
    for _ in range(3 * TRIALS):
        trial.note(trial.size, 1.0, out_of_memory=False)  # twice as many images in the same time
    assert trial.size == 8
    trial.note(8, 1.0, out_of_memory=True)
    assert trial.size == 4
    trial.note(4, 0.1, out_of_memory=False)
    trial.note(4, 0.1, out_of_memory=False)
    trial.note(3, 0.1, out_of_memory=False)
    assert trial.size == 4
    fixed = BatchSizeTrial(16)
    fixed.note(16, 1.0, out_of_memory=True)
    assert fixed.size == 16


def test_executions_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="`num_actors` has no use with engine 'processes'; launch processes by"):
        Execution(num_actors=2)
    with pytest.raises(InputError, match="`engine` is 'spark'; allowed: 'processes' or 'ray'"):
        Execution(engine="spark")
    with pytest.raises(InputError, match="`decoding_threads` is 0; allowed"):
        Execution(decoding_threads=0)
    with pytest.raises(InputError, match="`batch_size` is 'big'; allowed: a whole number of at least 1, or 'auto'"):
        parse_batch_size("big")
    with pytest.raises(InputError, match="`batch_size` is 0; allowed: at least 1, or 'auto'"):
        BatchSizeTrial(parse_batch_size("0"))
    with pytest.raises(InputError, match="`offload` needs an accelerator to load the networks onto, and none was"):
        check_offload(True, torch.device("cpu"))
    with pytest.raises(InputError, match=r"`device` is 'cuda:77', which can't be used here: .* Name a device of this"):
        named_device("cuda:77")
    assert parse_batch_size("auto") == "auto" and parse_batch_size("12") == 12


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_named_with_its_install_line():
    with pytest.raises(
        InputError, match=r"The engine 'ray' needs the library `ray`: pip install 'diffusers_fisher\[ra"
    ):
        import_ray()
