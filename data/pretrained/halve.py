"""Make a bundled file of a run: the moving average and the segmenter in half precision, and the
run's arguments without folders.

python -m data.pretrained.halve runs/colored/weights.pt data/pretrained/colored_mnist.pt
"""

import argparse
from pathlib import Path

from data import runs, weights

PLACES = ("data_dir", "weights_dir", "out", "resume", "weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("weights", type=Path, help="a run's weights.pt")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    content = runs.load_tensors(args.weights)
    if not isinstance(content, dict) or not {"average", "args"} <= content.keys():
        raise runs.UserError(
            f"{args.weights}: holds no moving average with its arguments; give a run's weights.pt"
        )
    # Where files lay on the machine of the run means nothing on another.
    kept = {k: v for k, v in content["args"].items() if k not in PLACES}
    if kept.get("textures"):
        kept["textures"] = Path(kept["textures"]).name
    bundled = {"args": kept}
    for name in ("average", "segmenter"):
        if name in content:
            bundled[name] = weights.to_half(content[name])
    runs.save_tensors(args.out, bundled)


if __name__ == "__main__":
    runs.run_main(main)
