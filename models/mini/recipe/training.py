"""What the three training stages share: Muon, averaged weights, a clock-driven schedule, checkpoints, two processes."""
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix, rounds=5):
    """Nearest semi-orthogonal matrix, roughly, by five Newton–Schulz rounds. `matrix: [rows, columns]`."""
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; convolutions are seen as `[out, in * height * width]`."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p, group):
        grad = p.grad[:, :, -1] if p.ndim == 5 else p.grad
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        buf = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buf, group["momentum"]).flatten(1)
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        update = (orthogonalised(update) * scale).view_as(grad)
        (p[:, :, -1] if p.ndim == 5 else p).add_(update, alpha=-group["lr"])


class Average:
    """Exponential moving average of named parameters, warmed up so that the start does not linger."""

    def __init__(self, module, decay):
        self.decay, self.steps = decay, 0
        self.values = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module):
        self.steps += 1
        keep = min(self.decay, self.steps / (self.steps + 10))
        for n, p in module.named_parameters():
            self.values[n].lerp_(p, 1 - keep)

    @torch.no_grad()
    def copy_to(self, module):
        for n, p in module.named_parameters():
            p.copy_(self.values[n])


class Run:
    """One training run: optimisers, averaged weights, checkpoint file and a schedule over processor seconds.

    The learning rate rises over the first 2 % of `budget_s` and falls as a cosine to 2 % of its peak, so a
    run finishes its schedule on machines of any speed; interruptions and busy neighbours do not count.
    """

    def __init__(self, module, optimizers, path, budget_s, decay=0.995):
        self.module, self.optimizers, self.path, self.budget_s = module, optimizers, Path(path), budget_s
        self.average = Average(module, decay)
        self.peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.seconds, self.steps, self.samples, self.log = 0.0, 0, 0, []
        self._last, self._saved = time.process_time(), time.time()
        if self.path.exists():
            self._load()

    def _load(self):
        state = torch.load(self.path, weights_only=False)
        self.module.load_state_dict(state["module"])
        self.average.values, self.average.steps = state["average"], state["average_steps"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.seconds, self.steps, self.samples, self.log = (state[k] for k in ("seconds", "steps", "samples", "log"))

    def save(self):
        if rank():
            return
        state = dict(module=self.module.state_dict(), average=self.average.values, average_steps=self.average.steps,
                     optimizers=[o.state_dict() for o in self.optimizers], seconds=self.seconds, steps=self.steps,
                     samples=self.samples, log=self.log)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        self._saved = time.time()

    def done(self):
        return self.seconds >= self.budget_s

    def step(self, samples):
        """Applies the gradients that are there; advances schedule, average and counters."""
        average_gradients(self.module)
        progress = min(1.0, self.seconds / self.budget_s)
        factor = min(1.0, progress / 0.02 + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.module)
        self.steps += 1
        self.samples += samples * world_size()
        self._tick()

    def _tick(self):
        now, cpu = time.time(), time.process_time()
        self.seconds += cpu - self._last
        self._last = cpu
        if world_size() > 1:  # or one of them would leave its last steps' partners waiting
            self.seconds = broadcast_float(self.seconds)
        if now - self._saved > 60:
            self.save()


# ---------------------------------------------------------------- processes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_float(value):
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, 0)
    return float(box)


def average_gradients(module):
    """Mean of all processes' gradients, in one message."""
    if world_size() == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def _enter(index, count, port, main, args):
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
    main(*args)


def launch(main, args, processes, port=29431):
    """Runs `main(*args)` in `processes` one-thread processes that average their gradients."""
    if processes == 1:
        return _enter(0, 1, port, main, args)
    mp.spawn(_enter, (processes, port, main, args), nprocs=processes)


def say(*parts):
    if rank() == 0:
        print(time.strftime("%H:%M:%S"), *parts, flush=True)
