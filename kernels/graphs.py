"""Training steps and drawn batches as CUDA graphs.

A step of a small network is hundreds of launches, and Python takes longer over each than a GPU. A
CUDA graph records them once and replays them all with one call. This file can be copied alone.
"""

import collections

import torch

# Calls of each kind before it is recorded, in which libraries and kernels choose their algorithms.
EAGER_CALLS = 3


class GraphedStep:
    """A training step, or another function, that is recorded as a CUDA graph and replayed.

        step = GraphedStep(function, optimizers, enabled=device.type == "cuda")
        losses = step(index, decay, penalty=True)

    function: takes tensors on the current device, and keywords, such as bools, that choose a
        variant of the step; returns tensors by name, detached. Each variant is recorded once for
        tensors of the same shapes and dtypes, after EAGER_CALLS ordinary calls. A graph holds
        launches and addresses, nothing of Python: whatever changes from step to step has to be a
        tensor that the function is given or changes in place. Random numbers come from the
        device's default generator, which may be seeded before each call.
    optimizers: Adam or another with `capturable`; state restored. Their learning rates become
        tensors: see `set_rate`.
    enabled: if not, the function is called as it is.

    What is returned is overwritten by no later call. RuntimeError if the function reads a value
    from the device while it is recorded.
    """

    def __init__(self, function, optimizers, enabled):
        self.function = function
        self.enabled = enabled
        self.calls = collections.Counter()
        self.recordings = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = enabled
                group["lr"] = float(group["lr"])  # a checkpoint may hold either form
                if enabled:
                    device = group["params"][0].device
                    group["lr"] = torch.tensor(group["lr"], device=device)

    def __call__(self, *inputs, **kind):
        if not self.enabled:
            return self.function(*inputs, **kind)
        key = (*kind.items(), *((x.shape, x.dtype) for x in inputs))
        self.calls[key] += 1
        if self.calls[key] <= EAGER_CALLS:
            return self.function(*inputs, **kind)
        if key not in self.recordings:
            self.recordings[key] = self.record(inputs, kind)
        graph, static_inputs, names, values = self.recordings[key]
        for static, value in zip(static_inputs, inputs):
            static.copy_(value)
        graph.replay()
        results = [torch.empty_like(value) for value in values]
        torch._foreach_copy_(results, values)
        return dict(zip(names, results))

    def record(self, inputs, kind):
        """The graph, the tensors it reads, and the names and values of what it computes."""
        static_inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's watchdog asks for its events.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self.function(*static_inputs, **kind)
        return graph, static_inputs, list(results), list(results.values())


def set_rate(group, rate):
    """Set the learning rate of an optimizer's parameter group, in place if it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
