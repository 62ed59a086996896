"""Train DeGMix on your own folder in the NYUD-v2 layout, on whichever of the six tasks it has labels for.

FOLDER/images/NAME.png                    the pictures
FOLDER/gt_sets/{train,val}.txt            which NAMEs are for training and for measuring
FOLDER/segmentation/NAME.png              semseg: 0 unlabelled, class k as k + 1
FOLDER/depth/NAME.npy                     metres, 0 unknown
FOLDER/normals/NAME.png                   255 · (n + 1) / 2
FOLDER/edge/NAME.png                      255 on boundaries
FOLDER/human_parts/NAME.png               0 background, 1 to 6 parts, 255 unlabelled
FOLDER/sal/NAME.png                       255 on what stands out

python examples/train_own_folder.py FOLDER --classes wall,floor,chair
python examples/train_own_folder.py FOLDER model.backbone=tiny model.pretrained=false train.steps=2000
"""

import argparse
from pathlib import Path

from rich.console import Console

from degmix import train
from degmix.config import load_config
from degmix.data.nyud import LABELS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", default="nyud", help="names of your classes; NYUD-v2's 40 by default")
    parser.add_argument("--out", type=Path, default=Path("runs/own"), help="new folder for the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the preset nyud_swin_t")
    given = parser.parse_intermixed_args()

    tasks = [task for task, (labels, *_) in LABELS.items() if (given.folder / labels).is_dir()]
    classes = f"[{given.classes}]" if "," in given.classes else given.classes
    described = [f"data.root={given.folder}", f"tasks=[{', '.join(tasks)}]", f"data.classes={classes}"]
    config = load_config("nyud_swin_t", [*described, *given.overrides])
    print(f"training on {', '.join(tasks)}")
    train.start(config, given.out, train.default_device(), Console())
    print(f"measure it with: degmix evaluate --checkpoint {given.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
