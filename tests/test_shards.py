"""Sharded parameters (DTensor): the cases of shard_cases*.py, in two processes at once."""

import os
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own imports
    import shard_cases_moved  # noqa: F401  (registers its cases)
    from shard_cases import CASES, init_device_mesh

WORLD = 2


def _work(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host is called
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=1),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    found = dict.fromkeys(CASES, "not reached: a case before it has failed")
    for name, run in CASES.items():
        try:
            run(mesh)
            found[name] = None
        except BaseException:  # pytest.raises raises one where nothing was raised
            # Whoever goes on alone waits for the other in its next collective.
            found[name] = traceback.format_exc()
            break
    torch.save(found, os.path.join(folder, str(rank)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What went wrong, by process and case."""
    folder = str(tmp_path_factory.mktemp("shards"))
    mp.spawn(_work, (folder,), nprocs=WORLD)
    return [torch.load(os.path.join(folder, str(rank))) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sharded(found, name):
    for rank in range(WORLD):
        assert found[rank][name] is None, f"process {rank}: {found[rank][name]}"
