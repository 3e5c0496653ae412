"""Checkpoints of a training: everything, so that a resumed run ends with the bits of an uninterrupted one."""
from data.runs import UserError, load_tensors, plain, save_tensors
from data.weights import check_state_dict

FROZEN = "biggan_GT.", "u2net."                            # not trained: come from files of their own, or the average

def step_seed(seed, step):
    """Each step seeds its own random numbers, so that a resumed run draws what an uninterrupted one draws."""
    return (seed * 1_000_003 + step * 7_919 + 17) % 2 ** 32


def save_training(out, step, args, parts, optimizers, **more):
    """checkpoint.pt holds all that training needs to go on; weights.pt the generator and its average alone.

    parts: name -> module, with "generator" and "average" among them. more: whatever the generator's reader needs.
    """
    states = {name: module.state_dict() for name, module in parts.items()}
    states["generator"] = {key: value for key, value in states["generator"].items() if not key.startswith(FROZEN)}
    facts = {"args": plain(args), "step": step, **more}
    save_tensors(out / "weights.pt", {name: states[name] for name in ("generator", "average")} | facts)
    save_tensors(out / "checkpoint.pt", states | facts | {"optimizers": [o.state_dict() for o in optimizers]})


def restore_training(path, args, parts, optimizers, free):
    """Load a checkpoint into everything and return its step. UserError if it belongs to other settings.

    free: names of arguments that may differ.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or not parts.keys() | {"optimizers", "step", "args"} <= content.keys():
        raise UserError(f"--resume {path}: not a checkpoint of this training")
    for name, value in plain(args).items():
        if name not in free and content["args"].get(name) != value:
            raise UserError(f"--resume {path}: was trained with {name} = {content['args'].get(name)}, not {value}; "
                            "give the same flags, or start a new run with another --out")
    for name, module in parts.items():
        own = module.state_dict()
        frozen = {key: value for key, value in own.items() if key.startswith(FROZEN)}
        module.load_state_dict(check_state_dict(frozen | content[name], own, path))
    for optimizer, state in zip(optimizers, content["optimizers"]):
        optimizer.load_state_dict(state)
    return content["step"]
