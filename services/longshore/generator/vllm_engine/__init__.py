"""vLLM behind the engine's seam (generator/engine.py); imported only where a job asks for it.

engine.py    VllmEngine: who is answered by which version, updates and their proof; knows no vllm
host.py      a thread with an event loop, on which vLLM's front end lives
process.py   the one file of the generator's process that imports vllm: requests, pauses, loads, scores
worker.py    the other side: what loads new weights, in each of vLLM's worker processes
segment.py   the shared memory through which they get there
loading.py   from one version to another: what is sent, the load, its proof
"""
