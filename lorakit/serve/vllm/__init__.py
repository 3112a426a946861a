"""The vLLM engine: a child process in another Python environment, asked over HTTP on a Unix socket.

argv      the command line and environment of the child
process   the child itself: its exit, the end of its log, what happens when we are killed
child     ready, watched, and started again after a crash
http      vLLM's calls; request, answer: the body of a completion, and its streamed pieces
base      what an adapter must fit, checked before vLLM is asked
cache     adapters as vLLM reads them, on disk
adapters  what vLLM has under which name, mixes too
engine    the seam
"""
