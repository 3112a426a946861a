"""`lorakit serve`: an OpenAI-compatible server that answers requests for many adapters from one base.

start        the parts put together                 `server` runs them as a process; `logs`, `metrics` watch it
api/         HTTP in OpenAI's forms                   requests and answers
guard/       who may ask for what, and how much       hosts, keys, bounds, allowed roots
renderer     messages -> token ids                    with the adapter's own template and stop tokens
registry     public name -> content hash              what is loaded, who uses it
engine       token ids -> token ids                   the seam: `embedded/` (here), `vllm/` (a child process)
"""
