import asyncio, random, sys, contextlib, faulthandler
sys.path.insert(0,"/work/main/tests/unit/actor")
from test_runner import *
import pytest
@pytest.mark.parametrize("n", range(60))
async def test_x(bench, n):
    await bench.issued(40)
    a = Actor(bench, places=4)
    await asyncio.sleep(random.uniform(0,0.08))
    a.task.cancel()
    done,_ = await asyncio.wait([a.task], timeout=5)
    if not done:
        for t in asyncio.all_tasks(): t.print_stack(file=sys.stderr)
    assert done
