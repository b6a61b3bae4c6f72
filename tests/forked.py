"""The script and curate.py as commands that start in milliseconds: forked from a server that has everything imported."""
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import threading
import traceback
from multiprocessing import forkserver

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELOADED = ["image_text_sim_clip", "curate", "forked_model", "pandas", "pyarrow.parquet", "pyarrow.compute", "numpy", "tqdm",
             "filelock", "psutil", "requests"]


def make_context():
    """A context whose processes are forked from a server with PRELOADED imported, the bundled model among them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before:
        os.environ["PYTHONPATH"] = before
    return context


@dataclasses.dataclass
class Command:
    """A command under way: `wait` gives its exit code; then `stderr` and `result`, its last line on stdout, are complete."""

    process: multiprocessing.process.BaseProcess
    readers: dict[int, threading.Thread]
    texts: dict[int, str]

    def wait(self, timeout=110):
        """The exit code, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        for reader in self.readers.values():
            reader.join(10)
        return self.process.exitcode

    def kill(self):
        """kill -9, and wait for its end."""
        self.process.kill()
        return self.wait()

    @property
    def stderr(self):
        return self.texts.get(2, "")

    @property
    def result(self):
        lines = self.texts.get(1, "").splitlines()
        return json.loads(lines[-1]) if lines else None


def start(context, folder, *arguments, program="image_text_sim_clip", environment=(), most_bytes=None):
    """Start `program` with the arguments; `folder` is for its pipes, `most_bytes` the size that no file may exceed."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    texts = {}
    readers = {}
    pipes = {}
    for number in (1, 2):
        pipe = folder / f"pipe-{os.urandom(8).hex()}"
        os.mkfifo(pipe)
        pipes[number] = str(pipe)

        def read(number=number, pipe=pipe):
            texts[number] = pipe.read_text(encoding="utf-8")
            pipe.unlink()
        readers[number] = threading.Thread(target=read, daemon=True)
        readers[number].start()
    settings = (program, [str(a) for a in arguments], pipes, dict(environment), most_bytes)
    process = context.Process(target=_run, args=settings)
    process.start()
    return Command(process, readers, texts)


def _run(program, arguments, pipes, environment, most_bytes):
    """In the child: redirect, limit, and call the program's own `run`."""
    for number, pipe in pipes.items():
        os.dup2(os.open(pipe, os.O_WRONLY), number)
    os.environ.update(environment)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import forked_model

    import curate
    import image_text_sim_clip as script
    from addons.results import memory_curve
    script.load_scorer = forked_model.reuse_scorer
    memory_curve.MemoryCurve = lambda clock: None
    curate.draw_plots = lambda *arguments: None
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = [program + ".py", *arguments]
    code = 1
    try:
        (script if program == "image_text_sim_clip" else curate).run()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
