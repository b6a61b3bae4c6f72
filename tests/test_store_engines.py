"""Clusters without a shared disk: all paths in an object store, and nothing else in common."""
import json
import os
import subprocess
import sys

import pytest
import store_server
from conftest import ROOT
from test_store_output import remote_run, results_in, results_of, strange_objects  # noqa: F401 - a fixture

TWO_NODES = """
import json, os, pathlib, subprocess, sys
from ray.cluster_utils import Cluster
mine = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
folders = [pathlib.Path(name).resolve() for name in ("head", "one", "two", "driver")]
for folder in folders:
    folder.mkdir()
os.chdir(folders[0])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **mine})
for folder in folders[1:3]:
    os.chdir(folder)
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
cluster.wait_for_nodes()
command = [sys.executable, "-c", *sys.argv[1:], "--set", f"ray_address={cluster.address}"]
run = subprocess.run(command, cwd=folders[3])
left = [str(path) for folder in folders for path in folder.rglob("*")]
print(json.dumps({"code": run.returncode, "left": left}))
cluster.shutdown()
"""

DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import image_text_sim_clip
from addons.engines import ray
described = ray.describe_job
ray.describe_job = lambda job: described(job).replace("/driver", "/a-folder-of-the-driver-alone")
sys.exit(image_text_sim_clip.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_nodes_that_share_nothing(remote_run, bucket, tmp_path):  # noqa: F811
    """Two Ray nodes with working folders of their own score each row once, and leave nothing on their disks."""
    pytest.importorskip("ray")
    assert remote_run.local().code == 0
    assert remote_run("--plan").code == 0
    command = [sys.executable, "-c", TWO_NODES, DRIVER, "--config", str(tmp_path / "remote.yaml"), "--set", "engine=ray",
               "--set", "ray_workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False,
                          env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})  # all of it on the loopback address
    told = json.loads(next(line for line in done.stdout.splitlines() if '"left"' in line))
    assert told == {"code": 0, "left": []}, done.stderr
    assert results_in(bucket, "out") == results_of(tmp_path / "local") and strange_objects(bucket, "out") == []
    workers = {json.loads(bucket.read(name))["worker"] for name in bucket.names("out/parts") if name.endswith(".json")}
    assert len(workers) == 2


@pytest.mark.slow
def test_slurm_tasks_that_share_nothing(remote_run, bucket, tmp_path, start_cli):  # noqa: F811
    """The tasks of an array, each in a folder of its own, share a bucket, and a local run finishes what a lost task left."""
    assert remote_run.local().code == 0
    assert remote_run("--plan").code == 0
    environment = {**store_server.CREDENTIALS, "AWS_ENDPOINT_URL": bucket.endpoint, "SLURM_ARRAY_TASK_COUNT": "3",
                   "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
    tasks = []
    for number in (0, 2):
        (tmp_path / f"node-{number}").mkdir()
        tasks.append(start_cli("--config", tmp_path / "remote.yaml", cwd=tmp_path / f"node-{number}",
                               env=environment | {"SLURM_ARRAY_TASK_ID": str(number)}))
    for task in tasks:
        assert task.wait(120) == 0
    assert len([name for name in bucket.names("out/parts") if name.endswith(".parquet")]) == 4
    assert remote_run().code == 0
    assert results_in(bucket, "out") == results_of(tmp_path / "local") and strange_objects(bucket, "out") == []


@pytest.mark.slow
def test_torchrun_ranks_share_a_bucket(remote_run, bucket, tmp_path):  # noqa: F811
    """Two ranks of torchrun share a bucket, and rank 0 writes the results."""
    pytest.importorskip("accelerate")
    assert remote_run.local().code == 0
    remote_run("--plan")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
               f"--master_port={store_server.free_port()}", str(ROOT / "image_text_sim_clip.py"), "--config",
               str(tmp_path / "remote.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert results_in(bucket, "out") == results_of(tmp_path / "local") and strange_objects(bucket, "out") == []
