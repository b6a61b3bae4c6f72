"""Runs in an object store whose requests fail, whose workers are killed, whose planners race: each row once all the same."""
import os
import random
import time

import botocore.exceptions
import pytest
import store_server
from test_store_output import remote_run, results_in, results_of, strange_objects  # noqa: F401 - a fixture

import image_text_sim_clip as script
from addons.inputs.files import InputFile
from addons.stores import commits, remote, s3_reader, spool
from addons.stores.paths import StorePath


@pytest.fixture
def proxied(bucket, s3_endpoint, monkeypatch):
    """Put a faulty proxy between the script and the server: proxied(every, kinds, only)."""
    proxies = []

    def start(every=10, kinds=store_server.FaultyProxy.KINDS, only=None):
        proxies.append(store_server.FaultyProxy(s3_endpoint, every, kinds, only))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        remote._open_file_system.cache_clear()
        s3_reader.open_reader.cache_clear()
        return proxies[-1]
    yield start
    for proxy in proxies:
        proxy.close()
    remote._open_file_system.cache_clear()
    s3_reader.open_reader.cache_clear()


@pytest.mark.slow
def test_requests_that_fail(remote_run, bucket, tmp_path, proxied):  # noqa: F811
    """With a fault in every tenth request a run ends with the bytes of one without."""
    assert remote_run.local().code == 0
    proxy = proxied()
    outcome = remote_run()
    assert outcome.code == 0, outcome.stderr
    assert all(proxy.met.values()), proxy.met
    assert results_in(bucket, "out") == results_of(tmp_path / "local")
    assert remote_run("--verify").code == 0 and strange_objects(bucket, "out") == []


@pytest.mark.slow
def test_store_that_is_gone(remote_run, bucket, proxied):  # noqa: F811
    """A store that answers nothing any more ends the run in one line with the documented exit; the same command goes on."""
    assert remote_run().code == 0
    proxied(every=1, kinds=("503",))
    outcome = remote_run("--verify")
    assert outcome.code == 5 and len(outcome.stderr.splitlines()) == 1 and "Traceback" not in outcome.stderr


def test_planners_race(remote_run, bucket, monkeypatch):  # noqa: F811
    """Of two planners with different tables one wins, also when neither waits for the other; no row of the loser's is left."""
    bucket.put("other.csv", b"url,caption\n" + b"".join(b"%d.png,other %d\n" % (n % 4, n) for n in range(40)))
    outcomes = race(remote_run, bucket, monkeypatch)
    assert sorted(outcome.code for outcome in outcomes) == [0, 2]
    loser = next(outcome for outcome in outcomes if outcome.code == 2)
    assert "planned" in loser.stderr and len([line for line in loser.stderr.splitlines() if "error" in line]) == 1
    captions = [line.split(",")[1] for line in bucket.read("out/scores.csv").decode().splitlines()[1:]]
    assert len(captions) == 40 and all(caption.startswith("other ") for caption in captions)


def race(remote_run, bucket, monkeypatch):  # noqa: F811
    """Have a second planner come just before the first writes its manifest, as if it had not waited; both outcomes."""
    outcomes = []
    original = commits.create_manifest

    def come_between(path, manifest):
        monkeypatch.setattr(commits, "create_manifest", original)
        outcomes.append(remote_run(csv_path=bucket.url("other.csv")))
        original(path, manifest)
    monkeypatch.setattr(commits, "create_manifest", come_between)
    monkeypatch.setattr(script, "locked", lambda *_: script.contextlib.nullcontext())
    outcomes.append(remote_run())
    return outcomes


def test_planners_race_without_conditional_create(remote_run, bucket, monkeypatch):  # noqa: F811
    """The control: where a plain PUT takes the place of the conditional one, the second manifest replaces the winner's."""
    bucket.put("other.csv", b"url,caption\n" + b"".join(b"%d.png,other %d\n" % (n % 4, n) for n in range(40)))
    monkeypatch.setattr(remote.RemoteStore, "create", lambda self, path, content: self.write(path, content))
    outcomes = race(remote_run, bucket, monkeypatch)
    assert [outcome.code for outcome in outcomes] != [0, 2]
    assert remote_run(csv_path=bucket.url("other.csv")).code == 2


def test_part_of_the_loser_is_not_taken(remote_run, bucket):  # noqa: F811
    """A part that another run left under this run's name is replaced, and none of its rows counts."""
    bucket.put("other.csv", b"url,caption\n" + b"".join(b"%d.png,other %d\n" % (n % 4, n) for n in range(40)))
    assert remote_run(csv_path=bucket.url("other.csv"), output_path=bucket.url("another")).code == 0
    assert remote_run().code == 0
    before = results_in(bucket, "out")
    bucket.put("out/parts/part-00003.parquet", bucket.read("another/parts/part-00003.parquet"))
    bucket.fs.rm_file(f"{bucket.name}/out/profile.json")
    assert remote_run().code == 0 and results_in(bucket, "out") == before


def test_put_that_took_effect_and_timed_out(bucket, proxied):
    """A PUT whose answer was lost is repeated, and what it wrote counts as written."""
    proxied(every=2, kinds=("lost",))
    for number in range(6):
        assert commits.create(StorePath(bucket.url(f"object-{number}")), b"%d" % number)
    assert [bucket.read(f"object-{number}") for number in range(6)] == [b"%d" % number for number in range(6)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments(remote_run, bucket, tmp_path, start_cli):  # noqa: F811
    """Two workers on one store, killed at random moments until one is finished: the bytes of an undisturbed run."""
    kills = int(os.environ.get("STORE_KILLS", "6"))
    rng = random.Random(int(os.environ.get("STORE_SEED", "17")))
    assert remote_run.local().code == 0
    remote_run("--plan")
    config = tmp_path / "remote.yaml"
    environment = {"AWS_ENDPOINT_URL": bucket.endpoint, **store_server.CREDENTIALS}
    done = 0
    runs = 0
    while done < kills:
        runs += 1
        prefix = bucket.url(f"out-{runs}")
        for _ in range(3):
            pair = [start_cli("--config", config, "--set", f"output_path={prefix}", env=environment) for _ in range(2)]
            time.sleep(rng.uniform(0.5, 6))
            for process in pair:
                done += process.poll() is None
                process.kill()
                process.communicate()
        last = start_cli("--config", config, "--set", f"output_path={prefix}", "--set", "loader_threads=1", env=environment)
        _, said = last.communicate(timeout=120)
        assert last.returncode == 0, said
        assert results_in(bucket, f"out-{runs}") == results_of(tmp_path / "local")
        if strange_objects(bucket, f"out-{runs}"):  # a busy server may get to a killed worker's request after all that
            last = start_cli("--config", config, "--set", f"output_path={prefix}", env=environment)
            assert last.wait(timeout=120) == 0
        assert strange_objects(bucket, f"out-{runs}") == [] and bucket.uploads() == []
    assert done >= kills


def test_credentials_that_run_out(remote_run, monkeypatch):  # noqa: F811
    """Credentials that expire in the middle end the run in one line, make no row a failure, and the same command goes on."""
    original = remote.RemoteStore.read_up_to
    reads = []

    def expire(self, path, size, begun=None):
        reads.append(path)
        if len(reads) > 2:
            raise remote.ExpiredCredentials(13, "no permission (The provided token has expired.)", path)
        return original(self, path, size, begun)
    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteStore, "read_up_to", expire)
        outcome = remote_run()
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error")]
    assert outcome.code == 3 and len(errors) == 1 and "expired" in errors[0] and "Traceback" not in outcome.stderr
    assert remote_run().result["failed"] == {"missing": 8}


def test_refused_credentials_are_told_apart():
    """What a client says of a token that has expired is not taken for a file that may not be read."""
    for said, is_expired in (("The provided token has expired.", True), ("ExpiredToken", True), ("Access Denied", False)):
        with pytest.raises(PermissionError) as raised, remote.calling("s3://b/k"):
            raise PermissionError(said)
        assert isinstance(raised.value, remote.ExpiredCredentials) == is_expired


def test_answers_are_told_by_their_code():
    """A number in a message, such as a part's, is no code; a bad token is no lost object."""
    def raised_for(error):
        with pytest.raises(OSError) as raised, remote.calling("s3://b/k"):
            raise error
        return type(raised.value)

    def answer_of_s3(status, code):
        answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
        error = OSError(5, "")
        error.__cause__ = botocore.exceptions.ClientError(answer, "PutObject")
        return error
    assert raised_for(Exception('Could not connect to "http://127.0.0.1:4123/b/parts/part-412.parquet"')) is OSError
    assert raised_for(answer_of_s3(412, "PreconditionFailed")) is FileExistsError
    assert raised_for(answer_of_s3(409, "ConditionalRequestConflict")) is remote.Conflict
    assert raised_for(answer_of_s3(403, "Unheard")) is PermissionError
    assert raised_for(answer_of_s3(400, "InvalidToken")) is remote.ExpiredCredentials
    assert raised_for(OSError("Forbidden: https://storage.example/b/k\nno storage.objects.get access")) is PermissionError
    with pytest.raises(FileNotFoundError, match="no such bucket or object"), remote.calling("gs://nobox/k"):
        raise FileNotFoundError("https://storage.example/upload/storage/v1/b/nobox/o")
    for said in ("Invalid Credentials, 401", "invalid_grant: Token has been expired", "ErrorCode:AuthenticationFailed",
                 "401 Client Error. Invalid credentials in Authorization header"):
        assert raised_for(Exception(said)) is remote.ExpiredCredentials


def test_conflict_with_others_is_tried_again(bucket, proxied, monkeypatch):
    """What S3 says when two create an object in the same moment is waited for; where it goes on, it is one error."""
    monkeypatch.setattr(remote, "CONFLICT_PAUSES_S", (0.01, 0.01))
    proxy = proxied(1, ("409",), lambda method, path: method == "PUT" and path.endswith("/once") and not proxy.met["409"])
    assert commits.create(StorePath(bucket.url("once")), b"x") and proxy.met["409"] == 1
    proxied(1, ("409",), lambda method, path: method == "PUT" and path.endswith("/always"))
    with pytest.raises(script.Trouble, match="ConditionalRequestConflict") as caught:
        commits.create(StorePath(bucket.url("always")), b"x")
    assert caught.value.exit_code == script.EXIT_DISK


def test_object_that_is_replaced_while_it_is_read(bucket, tmp_path, monkeypatch):
    """An object of which another version comes while it is read is an error, never a mixture of both."""
    monkeypatch.setattr(remote, "READ_BLOCK_BYTES", 1 << 20)
    path = bucket.put("big", b"1" * (5 << 20))
    file = remote.STORE.open(path)
    assert file.read(10) == b"1" * 10
    bucket.put("big", b"2" * (5 << 20))
    file.seek(4 << 20)
    with pytest.raises(OSError):
        file.read(10)
    read_range = remote.RemoteStore.read_range

    def replace_after(self, path, start, stop):
        data = read_range(self, path, start, stop)
        bucket.put("big", b"3" * (5 << 20))
        return data
    monkeypatch.setattr(remote.RemoteStore, "read_range", replace_after)
    with pytest.raises(OSError):
        spool.copy(InputFile("big", path), tmp_path / "copy")
