"""Hostile images together: what they cost is bounded in memory and in time, and each of them costs one row of the same run."""
import csv
import functools
import gc
import sys
import threading
import time
import zlib

import psutil
import pytest
import zoo
from PIL import Image
from small_inputs import resized_by_pillow

import image_text_sim_clip as script
from addons.images import costs, fetch, guard, memory

CONFIG = script.Config(pretrained_model="none")
MODEL_SIZES = script.DRY_RUN_SETTINGS


# ── The budget ────────────────────────────────────────────────────────────────────────────────────────────────────────

def run_all(*functions):
    """Run the functions in threads, one each; fails where one does not end."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_budget_is_kept_over_all_threads():
    """Whoever does not fit waits: never is more held than the budget has, and everybody gets a turn."""
    budget = memory.ByteBudget(100)
    most = []

    def work(size):
        for _ in range(20):
            with memory.Account(budget) as account:
                account.reserve(size, is_last=True)
                most.append(budget.held)
                time.sleep(0.0002)
    run_all(*(functools.partial(work, size) for size in (10, 30, 50, 70, 100, 20, 40)))
    assert max(most) <= 100 and len(most) == 140 and budget.held == 0


def test_what_exceeds_the_budget_is_worked_on_alone():
    """An image that needs more than the whole budget waits until nothing else is held, and then goes on."""
    budget = memory.ByteBudget(100)
    seen = []

    def work(size):
        with memory.Account(budget) as account:
            account.reserve(size, is_last=True)
            seen.append((size, budget.held))
            time.sleep(0.01)
    run_all(*(functools.partial(work, size) for size in (60, 500, 30, 500, 80)))
    assert [held for size, held in seen if size == 500] == [500, 500]


def test_those_who_hold_and_ask_again_do_not_wait_for_each_other():
    """Threads that all hold a part of the budget and all need more go on one after the other."""
    budget = memory.ByteBudget(100)
    together = threading.Barrier(5)
    most = []

    def work():
        with memory.Account(budget) as account:
            account.reserve(20)
            together.wait(10)
            account.reserve(50, is_last=True)
            most.append(budget.held)
            time.sleep(0.001)
    run_all(*[work] * 5)
    assert len(most) == 5 and max(most) <= 150  # all that were fetched, and the one that is decoded


def test_who_asks_for_no_more_goes_first():
    """Of those who wait, an image that can be finished goes before one that will ask again."""
    budget = memory.ByteBudget(100)
    order = []
    with memory.Account(budget) as first:
        first.reserve(100, is_last=True)

        def work(name, is_last):
            with memory.Account(budget) as account:
                account.reserve(60, is_last)
                order.append(name)
        threads = [threading.Thread(target=work, args=("begins", False)), threading.Thread(target=work, args=("ends", True))]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
    for thread in threads:
        thread.join(10)
    assert order == ["ends", "begins"]


def test_files_are_reserved_before_they_are_read(tmp_path):
    """A file is not read before its bytes fit into the budget, together with those of the images that are being decoded."""
    (tmp_path / "a").write_bytes(b"x" * 60)
    budget = memory.ByteBudget(100)
    held = []

    def decode(data, account):
        held.append((budget.held, account.held))
        return Image.new("RGB", (8, 8))
    loader = script.ImageLoader(functools.partial(script.read_file, tmp_path, max_bytes=1000), decode,
                                script.resize_coarsely,
                                open_account=functools.partial(memory.open_account, budget))
    run_all(*[functools.partial(loader, "a")] * 6)
    assert held == [(60, 60)] * 6 and budget.held == 0


def test_fetched_bytes_count_while_they_are_decoded():
    """What a fetch has brought counts in the budget from the moment a thread decodes it, and a fetch itself waits for none."""
    budget = memory.ByteBudget(100)
    fetcher = fetch.Fetcher(CONFIG)
    held = []

    def decode(data, account):
        held.append((budget.held, account.held))
        return Image.new("RGB", (8, 8))
    loader = script.ImageLoader(fetcher, decode, script.resize_coarsely,
                                open_account=functools.partial(memory.open_account, budget))
    brought = fetch.Outcome(b"x" * 60)
    run_all(*[lambda: fetcher.call_with(brought, lambda: loader("http://example.org/a.png"))] * 6)
    assert held == [(60, 60)] * 6 and budget.held == 0


def test_second_try_gives_back_what_the_first_took():
    """An image that is tried again without its metadata holds no more memory than one that is decoded at once."""
    plain = zoo.saved(zoo.photo(), "PNG")
    broken = plain[:-12] + zoo.png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))) + plain[-12:]  # found at its end
    with memory.Account(memory.image_memory("auto")) as once, memory.Account(memory.image_memory("auto")) as twice:
        script.decode_image(plain, CONFIG, None, once)
        script.decode_image(broken, CONFIG, None, twice)
        assert twice.held == once.held > 0


def test_image_that_was_given_up_takes_no_more_memory():
    """Whoever decodes an image that nobody waits for any more cannot take memory that would never be given back."""
    budget = memory.ByteBudget(100)
    with memory.Account(budget) as account:
        account.reserve(10)
    with pytest.raises(script.RowFailure):
        account.reserve(10)
    assert budget.held == 0


@pytest.mark.parametrize("is_guarded", [False, True])
def test_nothing_holds_on_to_the_bytes_of_an_image_that_failed(is_guarded):
    """What is kept of a failed row until its part is written is its status, not its file."""
    data = [bytes([n]) * 1000 for n in range(1, 6)]
    loader = script.ImageLoader(lambda source: data[int(source)], script.ImageDecoder(CONFIG, MODEL_SIZES), None)
    if is_guarded:
        loader = guard.Guard(CONFIG, MODEL_SIZES).attach(loader)
    gc.disable()
    try:
        before = [sys.getrefcount(one) for one in data]
        loaded = [loader(str(n)) for n in range(5)]
        assert [one.failure.status for one in loaded] == ["not_image"] * 5
        time.sleep(0.1)
        assert [sys.getrefcount(one) for one in data] == before
    finally:
        gc.enable()


def test_auto_budget_stays_within_the_machine(monkeypatch):
    """`auto` is at most a quarter of what the machine or its container has, shared among the processes started here."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 2 * 2**30)
    memory.image_memory.cache_clear()
    assert memory.image_memory("auto").total == 2**29
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory.image_memory.cache_clear()
    assert memory.image_memory("auto").total == 2**28
    memory.image_memory.cache_clear()
    assert memory.image_memory(64).total == 2**26


# ── Costs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_honest_files_are_not_doubtful():
    """None of the zoo's proper images, and no broken one, needs a process of its own or is refused for its structure."""
    for name, data, *_ in [*zoo.proper(), *zoo.broken()]:
        assert costs.look(data, CONFIG.max_image_pixels) is False, name


@pytest.mark.parametrize("name", ["profiles.png", "filling.jpg", "junk.jpg"])
def test_what_pillow_walks_through_slowly_is_doubtful(name):
    """Hundreds of colour profiles, or megabytes between the segments of a JPEG, are left to a process that can be ended."""
    data = next(data for animal, data, _ in zoo.hostile() if animal == name)
    assert costs.look(data, CONFIG.max_image_pixels)


@pytest.mark.parametrize(("name", "data", "statuses"), [pytest.param(*animal, id=animal[0]) for animal in zoo.hostile()])
def test_cost_is_seen_before_it_is_paid(name, data, statuses):
    """Looking at a hostile file takes no time worth mentioning, and refuses those that must be refused."""
    started = time.process_time()
    try:
        costs.look(data, CONFIG.max_image_pixels)
        refused = ()
    except script.RowFailure as failure:
        refused = (failure.status,)
        assert failure.detail.isprintable()
    assert time.process_time() - started < 1
    assert set(refused) <= set(statuses)
    if statuses in (("bomb",), ("corrupt",)):
        assert refused == statuses


@pytest.mark.parametrize("endian", ["<", ">"])
def test_tiff_cut_anywhere_is_for_the_decoder_to_judge(endian):
    """A directory that is cut off, or lies outside the file, makes nothing raise here."""
    whole = zoo.saved(Image.new("RGB", (40, 30)), "TIFF", compression="tiff_lzw")
    for end in range(0, len(whole), 7):
        assert costs.look(whole[:end], 1_000_000) in (False, True)
    assert costs.look(b"II*\0" + b"\xff" * 4, 1_000_000) is False
    assert costs.look(b"MM\0+" + b"\xff" * 40, 1_000_000) is False


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_work_that_does_not_return_is_given_up():
    """A thread that hangs costs its image, and the images after it are decoded in processes of their own."""
    watched = guard.Guard(script.Config(pretrained_model="none", decode_timeout_s=0.3), MODEL_SIZES)
    account = memory.Account(memory.ByteBudget(100))
    release = threading.Event()
    with pytest.raises(script.RowFailure, match="crashed: decoder did not return"):
        watched.watch(lambda: release.wait(60), account)
    assert watched.isolates_all
    assert watched.watch(lambda: "an answer", account) == "an answer"
    release.set()
    watched.close()


def test_waiting_for_memory_is_not_the_images_own_time():
    """An image that waits for its turn longer than the limit is not given up."""
    watched = guard.Guard(script.Config(pretrained_model="none", decode_timeout_s=0.3), MODEL_SIZES)
    budget = memory.ByteBudget(100)
    with memory.Account(budget) as account:
        other = memory.Account(budget)
        other.reserve(100)
        timer = threading.Timer(1.0, other.release)
        timer.start()

        def work():
            account.reserve(50, is_last=True)
            return "done"
        assert watched.watch(work, account) == "done"
    assert not watched.isolates_all
    watched.close()


def test_doubtful_image_is_decoded_in_a_child_with_the_same_pixels():
    """Where an image is decoded does not show in its pixels."""
    careful = guard.Guard(script.Config(pretrained_model="none", memory_budget_mib=64), MODEL_SIZES)
    data = zoo.tiled_tiff(32, 1200)
    assert costs.look(data, CONFIG.max_image_pixels)
    with memory.Account(memory.image_memory(64)) as account:
        image = careful.decode(data, account)
        assert image.tobytes() == script.ImageDecoder(CONFIG, MODEL_SIZES)(data).tobytes()
    careful.close()


# ── Resize and after ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("error", "status"), [
    (MemoryError(), "bomb"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "bomb"),
    (RuntimeError("Input and output sizes should be greater than 0"), "corrupt"), (ValueError("height and width"), "corrupt")])
def test_resize_fails_its_row(picture_bytes, error, status):
    """What goes wrong behind decoding is the row's failure, not the run's."""
    def resize(image):
        raise error
    loaded = script.ImageLoader(lambda source: picture_bytes(), script.ImageDecoder(CONFIG, MODEL_SIZES), resize)("x")
    assert loaded.failure.status == status


@pytest.mark.parametrize("size", [(1, 30_000_001), (30_000_001, 1), (3, 5_000_000), (100_000, 300)])
@pytest.mark.parametrize("resample", [2, 3])
def test_strip_is_resized_whole_in_bounded_memory(size, resample):
    """A model that squeezes the whole image gets a strip in its true colours, however long, and without gigabytes."""
    pytest.importorskip("torch")
    width, height = size
    image = Image.new("RGB", size, (200, 10, 10))
    half = (0, 0, width, height // 2) if height > width else (0, 0, width // 2, height)
    image.paste((10, 10, 200), half)
    settings = script.ImageSettings(None, (64, 64), None, resample)
    for resize in (script.resize_fast, resized_by_pillow):
        pixels = resize(image, settings)
        assert pixels.shape == (3, 64, 64)
        first, last = (pixels[:, 5], pixels[:, -5]) if height > width else (pixels[..., 5], pixels[..., -5])
        assert abs(first.T.astype(int) - (10, 10, 200)).max() <= 2
        assert abs(last.T.astype(int) - (200, 10, 10)).max() <= 2


def test_shortening_a_strip_does_not_show(noise):
    """A strip that is shrunk before it is resized comes out within a level or two of one that is not."""
    image = noise(40_000, 220)
    settings = script.ImageSettings(None, (224, 224), None, 3)
    whole = image.resize((224, 224), Image.Resampling.BICUBIC)
    shortened = resized_by_pillow(image, settings)
    assert script.trim_strip(image, settings).size[0] <= script.MAX_LONG_EDGE
    assert abs(shortened.astype(int).transpose(1, 2, 0) - whole).max() <= 2


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_hostile_zoo_in_one_run(tmp_path, write_config, write_table, start_cli):
    """One run over everything hostile ends with the right statuses, within the budget of memory and 300 MB."""
    animals = [*zoo.hostile(), *zoo.broken()]
    config = write_config(max_failure_rate=1.0, loader_threads=4)
    for name, data, _ in animals:
        (tmp_path / "pictures" / name).write_bytes(data)
    write_table([("url", "caption"), *((name, f"a caption of {name}") for name, *_ in animals)])
    process = start_cli("--config", config)
    baseline, peak = 0, 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            resident = sum(member.memory_info().rss for member in family)
        except psutil.NoSuchProcess:
            continue
        if not (tmp_path / "out" / "parts" / "part-00000.trying").exists() and not peak:
            baseline = max(baseline, resident)
        else:
            peak = max(peak, resident)
        time.sleep(0.01)
    _, talk = process.communicate()
    assert process.returncode == 0, talk
    budget = memory.image_memory("auto").total
    assert peak - baseline < budget + 300e6, (peak, baseline, budget)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        found = {row["url"]: row["status"] for row in csv.DictReader(file)}
    assert not {name: found[name] for name, _, statuses in animals if found[name] not in statuses}
