"""Checkpoints of a training: everything, so that a resumed run ends with the bits of an uninterrupted one."""
from data.runs import UserError, load_tensors, plain, save_tensors
from data.weights import check_state_dict

FROZEN = "biggan_GT.", "u2net."                            # not trained: come from files of their own, or the average


def step_seed(seed, step):
    """Each step seeds its own random numbers, so that a resumed run draws what an uninterrupted one draws."""
    return (seed * 1_000_003 + step * 7_919 + 17) % 2 ** 32


def save_training(out, step, args, parts, optimizers, *, best_too=False, **more):
    """checkpoint.pt holds all that training needs to go on; weights.pt the network and its average alone.

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
    save_tensors(out / "checkpoint.pt", states | facts | {"optimizers": [o.state_dict() for o in optimizers]})


def restore_training(path, args, parts, optimizers, free):
    """Load a checkpoint into everything and return its content. UserError if it belongs to other settings.

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
    return content
