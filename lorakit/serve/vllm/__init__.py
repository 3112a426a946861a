"""The vLLM engine: a child process that runs vLLM from an environment of its own."""
