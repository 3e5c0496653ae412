"""Checkpoints, and the bookkeeping at the end of every training step.

A checkpoint holds everything that a training needs, so that a resumed run is bit-identical to an
uninterrupted one. The last two are kept.
"""

import json
import os
import sys
from pathlib import Path

import torch

from data import pictures, runs, weights

# Networks that are not trained, and not saved with the generator: the cGAN is loaded again from its
# file, U^2-Net is saved with the moving average.
FROZEN = ("biggan_GT.", "u2net.")

# Arguments that may change when a run is resumed, in all scripts.
FREE = frozenset(
    # A preset only sets the defaults of others.
    "preset epochs max_steps segmenter_steps seeds explain"
    " out resume device kernels graph recompute compile workers"
    " weights weights_dir data_dir biggan u2net pretrained"
    " log_every sample_every save_every bad_steps"
    " counterfactual cf_test baseline cue_conflict imagenet9 in9_normalization ood"
    " n start interpolate to frames".split()
)
# Values to assume for runs that are older than these flags.
FORMER = {"texture_padding": "zeros", "mask_gain": 1.0, "shapes": "generated"}


# --------------------------------------------------------------------------------------------------
# Bookkeeping of a training loop


class Training:
    """What is due at the end of a training step: log, sheets, checkpoints, skipped steps, the stop.

        training = Training(out, args, networks, optimizers, last_step, device)
        for step in range(training.step, last_step):
            ...
            training.end_step(losses, skipped)

    networks: name -> module, restored from the newest checkpoint if the run is resumed.
    written: the names of those that go into weights.pt.
    extra: further values to keep, numbers or tensors by name; the loop may change them.
    draw_sheet: a function of (networks, args) that returns a picture, uint8 (3, H, W).
    saved: path and content of the checkpoint, if it is not the one that args.resume names.
    stop: a StopSignal, if several loops share one.

    Only rank 0 writes. UserError if the checkpoint belongs to other settings or networks.
    """

    def __init__(
        self,
        out,
        args,
        networks,
        optimizers,
        last_step,
        device,
        *,
        written=(),
        extra=None,
        draw_sheet=None,
        saved=None,
        stop=None,
    ):
        self.out = Path(out)
        self.args = args
        self.networks = networks
        self.optimizers = optimizers
        self.last_step = last_step
        self.device = device
        self.written = written
        self.draw_sheet = draw_sheet

        path, content = saved or read_checkpoint(out, args.resume)
        if content:
            restore(path, content, args, networks, optimizers)
        self.step = content.get("step", 0)
        if self.step > last_step and runs.is_main_rank():
            print(f"warning: {self.step} steps are done, more than {last_step}", file=sys.stderr)
        self.extra = {}
        for name, value in (extra or {}).items():
            value = content.get(name, value)
            self.extra[name] = value.to(device) if isinstance(value, torch.Tensor) else value

        self.unchecked = []  # (step, losses, skipped) of the steps whose flags were not read yet
        # Losses of good steps since the last line of the log, by name.
        self.totals = {k: list(v.to(device)) for k, v in content.get("window", {}).items()}
        self.streak = 0  # skipped steps in a row
        self.stop = stop or runs.StopSignal()
        self.log = None
        if runs.is_main_rank():
            epoch = self.extra.get("epoch", float("inf"))
            self.log = runs.Log(self.out / "log.jsonl", self.step, epoch)

    def end_step(self, losses, skipped):
        """Do what is due after a step. Raises runs.Stopped if the run is to stop here.

        losses: name -> number or tensor (). skipped: tensor (), above 0 if a step was left out, see
        `finite_step`. Both stay on the device until a line of the log or a file is due: a GPU is
        not waited for in between.
        """
        args = self.args
        self.step += 1
        # Detached, so that what waits here does not keep its graph.
        kept = {k: v.detach() if torch.is_tensor(v) else v for k, v in losses.items()}
        self.unchecked.append((self.step, kept, skipped))
        finished = self.step == self.last_step
        stopping = runs.any_across_ranks(self.stop, self.device)
        log_due = finished or self.step % args.log_every == 0
        save_due = finished or stopping or self.step % args.save_every == 0
        sample_due = self.draw_sheet is not None and args.sample_every > 0
        sample_due = sample_due and (finished or self.step % args.sample_every == 0)

        if log_due or save_due or sample_due:
            self.check_steps()
        if log_due:
            self.write_log()
        if sample_due:
            self.save_sheet(self.out / "samples" / f"{self.step:07d}.png")
        if save_due:
            self.save()
        if stopping and not finished:
            if self.log:
                print(
                    f"\nstopped after step {self.step}; resume with the same command and --resume"
                )
            raise self.stop.stopped()

    def check_steps(self):
        """Read which steps were skipped. They are told, and kept out of the means. UserError after
        --bad-steps in a row.
        """
        flags = torch.stack([skipped for _, _, skipped in self.unchecked]).tolist()
        for flag, (step, losses, _) in zip(flags, self.unchecked):
            if flag:
                self.streak += 1
                self.tell_skipped(step, losses)
                continue
            self.streak = 0
            for name, value in losses.items():
                value = torch.as_tensor(value, device=self.device)
                self.totals.setdefault(name, []).append(value)
        self.unchecked = []

    def tell_skipped(self, step, losses):
        """Log a skipped step. UserError if it is one too many in a row."""
        values = {name: float(value) for name, value in losses.items()}
        if self.log:
            self.log.write(step, left_out=self.streak, **values)
            print(
                f"warning: step {step} skipped: losses or gradients are not finite", file=sys.stderr
            )
        if self.streak == self.args.bad_steps:
            words = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            advice = "start a new run with smaller learning rates"
            if (self.out / "weights.pt").is_file():
                advice += ", and with --weights of the last checkpoint, which is kept"
            raise runs.UserError(
                f"--bad-steps: {self.streak} steps in a row up to {step} without finite losses and "
                f"gradients ({words}); {advice}"
            )

    def write_log(self):
        """One line with the mean of each loss since the last line."""
        means = {}
        for name, values in self.totals.items():
            means[name] = runs.mean_over_ranks(torch.stack(values).mean()).item()
        self.totals = {}
        if not self.log:
            return
        self.log.write(self.step, **means)
        self.log.progress(self.step, self.last_step, means)
        # ImageNet's "mask" is a loss.
        mask_mean = means.get("mask_mean", means.get("mask", 0.5))
        if not 0.02 < mask_mean < 0.98:
            print(f"warning: the mean mask is {mask_mean:.3f}: it has collapsed", file=sys.stderr)

    def end_epoch(self, epoch, whole, score):
        """Count an epoch (from 0) and its score in `extra`. Returns whether its weights are the
        best so far.

        whole: whether all its steps were taken. One that was cut is not counted: it may be resumed.
        """
        extra = self.extra
        better = score > extra["best"] and (whole or extra["best"] < 0)
        if whole:
            extra["epoch"] = epoch + 1
            extra["sums"].zero_()
            extra["best"] = max(extra["best"], score)
        return better

    def save_sheet(self, path):
        """Draw a sheet and write it."""
        if runs.is_main_rank():
            path.parent.mkdir(exist_ok=True)
            pictures.save_picture(path, self.draw_sheet(self.networks, self.args))

    def save(self):
        """Write weights.pt, then the checkpoint; the one before becomes checkpoint_before.pt."""
        if self.unchecked:
            self.check_steps()
        window = {}
        for name, values in self.totals.items():
            window[name] = runs.mean_over_ranks(torch.stack(values))
        content = self.content()
        if self.written:
            self.save_weights("weights.pt", content)
        if not runs.is_main_rank():
            return
        content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        content["window"] = window
        newest = self.out / "checkpoint.pt"
        runs.save_tensors(self.out / "checkpoint_new.pt", content)
        # A run that is killed here draws it again: the checkpoint before is still the newest.
        if self.draw_sheet:
            self.save_sheet(self.out / "sheet.png")
        if newest.is_file():
            os.replace(newest, self.out / "checkpoint_before.pt")
        os.replace(self.out / "checkpoint_new.pt", newest)

    def save_weights(self, file, content):
        """Write what a reader of the weights needs of `content`: no networks of training alone."""
        unwritten = self.networks.keys() - set(self.written)
        kept = {name: value for name, value in content.items() if name not in unwritten}
        if runs.is_main_rank():
            runs.save_tensors(self.out / file, kept)

    def content(self):
        """The networks' states, arguments, step, and extra values, tensors as means over ranks."""
        content = {name: network.state_dict() for name, network in self.networks.items()}
        if "generator" in content:
            trained = content["generator"].items()
            content["generator"] = {k: v for k, v in trained if not k.startswith(FROZEN)}
        content["args"] = runs.to_jsonable(vars(self.args))
        content["step"] = self.step
        for name, value in self.extra.items():
            if isinstance(value, torch.Tensor):
                value = runs.mean_over_ranks(value)
            content[name] = value
        return content


# --------------------------------------------------------------------------------------------------
# Reading a checkpoint


def read_checkpoint(out, resume):
    """Path and content of the checkpoint to resume from; (None, {}) if there is none yet.

    resume: None to begin anew, "auto" for the newest in the folder `out`, or a file.
    """
    if resume is None:
        return None, {}
    if resume != "auto":
        return resume, runs.load_tensors(resume)
    path, content = find_checkpoint(Path(out))
    return path, content or {}


def find_checkpoint(out):
    """Path and content of the newest intact checkpoint in a run folder; (None, None) without one.

    A damaged one is named, and the one before is taken. UserError if all are damaged.
    """
    found = [out / name for name in ("checkpoint.pt", "checkpoint_before.pt")]
    found = [path for path in found if path.is_file()]
    for path in found:
        try:
            if not runs.is_intact_archive(path):
                raise runs.UserError(f"{path}: its checksums are wrong")
            return path, runs.load_tensors(path)
        except runs.UserError as error:
            print(f"warning: {error}; falling back to the previous one", file=sys.stderr)
    if found:
        raise runs.UserError(
            f"--resume: no checkpoint in {out} is intact; start a new run with another --out"
        )
    return None, None


def restore(path, content, args, networks, optimizers):
    """Load a checkpoint's content. UserError if it belongs to other settings or networks."""
    needed = {*networks, "optimizers", "step", "args"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise runs.UserError(f"--resume {path}: not a checkpoint of this training")
    check_settings(path, content["args"], vars(args))
    if "weights" in content["args"]:  # what the run began with, whatever the flag says now
        args.weights = content["args"]["weights"]
    for name, network in networks.items():
        own = network.state_dict()
        frozen = {key: value for key, value in own.items() if key.startswith(FROZEN)}
        state = weights.check_state_dict(frozen | content[name], own, path)
        weights.load_into(network, state)
    for optimizer, state in zip(optimizers, content["optimizers"]):
        optimizer.load_state_dict(state)


def check_settings(path, before, args, free=FREE):
    """UserError if arguments that are not in `free` differ from those that made `path`.

    Flags that are younger than the file do not count, but for FORMER, nor do folders of textures,
    which may have moved.
    """
    before = FORMER | before
    if not (before.get("border_weight", 1) and before.get("frame_weight", 1)):
        before["warmup"] = 0  # nothing acted in it, whatever older runs say
    for name, value in runs.to_jsonable(args).items():
        if name in free or name not in before or before[name] == value:
            continue
        folders = value not in (None, "dtd") and before[name] not in (None, "dtd")
        if name == "textures" and folders:
            continue
        if name == "class_counts":
            raise runs.UserError(
                f"--resume {path}: the images in --data-dir have changed since; start a new run "
                "with another --out"
            )
        raise runs.UserError(
            f"--resume {path}: made with {name} = {before[name]}, not {value}; give the same "
            "flags, or start a new run with another --out"
        )


def check_resumed(out, args, free=FREE):
    """UserError if the run in the folder `out` had other arguments, except those in `free`.

    Called before args.json is written anew.
    """
    if (out / "args.json").is_file():
        before = json.loads((out / "args.json").read_text())["args"]
        check_settings(out, before, args, free)


# --------------------------------------------------------------------------------------------------
# Steps whose numbers are not finite


def finite_step(optimizer, loss):
    """One step of the optimizer, skipped if the loss or a gradient is not finite on any rank.

    Returns a tensor (), 1.0 if the step was skipped, else 0.0. But for the first step, a GPU is not
    waited for.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack(torch._foreach_norm(gradients)).sum() + loss.detach()
    skipped = runs.mean_over_ranks((~total.isfinite()).float()).ceil()
    if not optimizer.state:  # nothing to go back to: this step allocates the moments
        if not skipped:
            optimizer.step()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped  # the kernels leave weights and moments as they are
        optimizer.step()
    else:
        step_or_go_back(optimizer, parameters, skipped)
    return skipped


@torch.no_grad()
def step_or_go_back(optimizer, parameters, skipped):
    """One step of the optimizer, undone on the device if `skipped` is above 0."""
    changed = list(parameters)
    for moments in optimizer.state.values():
        changed += [value for value in moments.values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in changed]
    optimizer.step()
    bad = skipped > 0
    for value, old in zip(changed, before):
        value.copy_(torch.where(bad, old, value))


@torch.no_grad()
def mend_statistics(*networks):
    """Start BatchNorm's running statistics anew where a skipped step made them NaN or infinite."""
    for network in networks:
        for module in network.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.nan_to_num_(0.0, 0.0, 0.0)
                module.running_var.nan_to_num_(1.0, 1.0, 1.0)
