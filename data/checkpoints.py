"""Checkpoints of a training: everything, so that a resumed run ends with the bits of an uninterrupted one; bad steps."""
import os
import sys

import torch

from data.runs import UserError, intact_archive, load_tensors, mean_over_ranks, plain, save_tensors
from data.weights import check_state_dict

FROZEN = "biggan_GT.", "u2net."                            # not trained: come from files of their own, or the average


def step_seed(seed, step):
    """Each step seeds its own random numbers, so that a resumed run draws what an uninterrupted one draws."""
    return (seed * 1_000_003 + step * 7_919 + 17) % 2 ** 32


def save_training(out, step, args, parts, optimizers, *, best_too=False, **more):
    """checkpoint.pt holds all that training needs to go on; weights.pt the network and its average alone.

    The checkpoint before is kept as checkpoint_before.pt.

    parts: name -> module; the network is "generator" or "ensemble", its average is "average", if there is one.
    more: whatever the weights' reader needs. best_too: the weights as weights_best.pt as well.
    """
    states = {name: module.state_dict() for name, module in parts.items()}
    if "generator" in states:
        states["generator"] = {key: value for key, value in states["generator"].items() if not key.startswith(FROZEN)}
    facts = {"args": plain(args), "step": step, **more}
    weights = {name: states[name] for name in ("generator", "ensemble", "average") if name in states} | facts
    for name in ["weights.pt"] + ["weights_best.pt"] * best_too:
        save_tensors(out / name, weights)
    save_checkpoint(out, states | facts | {"optimizers": [o.state_dict() for o in optimizers]})


def save_checkpoint(out, content):
    """Write checkpoint.pt; the one before becomes checkpoint_before.pt."""
    save_tensors(out / "checkpoint_new.pt", content)
    if (out / "checkpoint.pt").is_file():
        os.replace(out / "checkpoint.pt", out / "checkpoint_before.pt")
    os.replace(out / "checkpoint_new.pt", out / "checkpoint.pt")


def find_checkpoint(out):
    """Path and content of the newest intact checkpoint in a run folder; None, None if there is none yet.

    A damaged one is named, and left for the one before. UserError if all are damaged.
    """
    found = [path for path in (out / "checkpoint.pt", out / "checkpoint_before.pt") if path.is_file()]
    for path in found:
        try:
            if not intact_archive(path):
                raise UserError(f"{path}: its checksums are wrong")
            return path, load_tensors(path)
        except UserError as error:
            print(f"warning: {error}; going back to the one before", file=sys.stderr)
    if found:
        raise UserError(f"--resume: no checkpoint in {out} is intact; start a new run with another --out")
    return None, None


def check_settings(path, before, args, free):
    """UserError if arguments that are not in `free` differ from those of a checkpoint."""
    for name, value in plain(args).items():
        if name not in free and before.get(name) != value:
            raise UserError(f"--resume {path}: was trained with {name} = {before.get(name)}, not {value}; "
                            "give the same flags, or start a new run with another --out")


def restore_training(out, args, parts, optimizers, free):
    """Load the checkpoint that args.resume means, a file or "auto" for the newest in `out`, into everything.

    free: names of arguments that may differ. Returns its content, {} if there is nothing to resume. UserError if it
    belongs to other settings.
    """
    if args.resume in (None, "auto"):
        path, content = find_checkpoint(out) if args.resume else (None, None)
        if path is None:
            return {}
    else:
        path, content = args.resume, load_tensors(args.resume)
    if not isinstance(content, dict) or not parts.keys() | {"optimizers", "step", "args"} <= content.keys():
        raise UserError(f"--resume {path}: not a checkpoint of this training")
    check_settings(path, content["args"], args, free)
    for name, module in parts.items():
        own = module.state_dict()
        frozen = {key: value for key, value in own.items() if key.startswith(FROZEN)}
        module.load_state_dict(check_state_dict(frozen | content[name], own, path))
    for optimizer, state in zip(optimizers, content["optimizers"]):
        optimizer.load_state_dict(state)
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Numbers gone wrong


def finite_step(optimizer, loss):
    """One step of the optimizer, left out if the loss or a gradient is not finite, on any rank.

    Returns 1.0 if it was left out, else 0.0, as a tensor: with an optimizer's fused form a GPU is not waited for.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    bad = ~(torch.stack(torch._foreach_norm(gradients)).sum() + loss.detach()).isfinite()
    bad = mean_over_ranks(bad.float()).ceil()
    fused = optimizer.defaults.get("fused") and optimizer.state           # with moments that are there
    if fused:
        optimizer.found_inf = bad                          # its kernels leave weights and moments as they are
    if fused or not bad:
        optimizer.step()
    return bad


def leave_out(step, losses, bad_steps, args, networks, log):
    """After a step that finite_step left out: mend, and log, if there is a log. UserError if it was one too many."""
    values = {name: value.item() for name, value in losses.items()}
    if log:
        log.write(step, left_out=bad_steps, **values)
        print(f"warning: step {step} left out: losses or gradients are not finite", file=sys.stderr)
    if bad_steps == args.bad_steps:
        words = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        raise UserError(f"--bad-steps: {bad_steps} steps in a row up to {step} without finite losses and gradients "
                        f"({words}); the last checkpoint is kept: start a new run from its weights.pt with --weights and "
                        "smaller learning rates")
    for network in networks:
        mend_statistics(network)


@torch.no_grad()
def mend_statistics(network):
    """Start BatchNorm's running statistics anew where a step that was left out made them NaN."""
    for module in network.modules():
        if getattr(module, "running_var", None) is not None and not module.running_var.isfinite().all():
            module.reset_running_stats()
