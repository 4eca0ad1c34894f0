"""``python -m tools.mini``: build and pretrain the mini family."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from packshot.lists import map_values

if TYPE_CHECKING:
    from tools.mini.folder import Family

# In the order in which they are trained: the first ones need scenes only, the UNet needs what comes before it.
FAMILY_OF = {
    "tokenizer": "sdxl",
    "matting": "matting",
    "judge": "judge",
    "vae": "sdxl",
    "clip": "sdxl",
    "unet": "sdxl",
    "florence2": "florence2",
    "mllama": "mllama",
}
STAGES = tuple(FAMILY_OF)
MINUTES = {"vae": 15.0, "clip": 5.0, "unet": 40.0, "florence2": 10.0, "mllama": 10.0, "matting": 20.0, "judge": 20.0}


def _refuse_unknown(stages: set[str]) -> None:
    if stages:
        raise argparse.ArgumentTypeError(f"no such stage: {', '.join(sorted(stages))}; there are {', '.join(STAGES)}")


def _minutes(text: str) -> dict[str, float]:
    given = dict(item.split("=", 1) for item in text.split(",") if item)
    _refuse_unknown(set(given) - set(MINUTES))
    return MINUTES | map_values(float, given)


def _stages(text: str) -> tuple[str, ...]:
    chosen = STAGES if text == "all" else tuple(text.split(","))
    _refuse_unknown(set(chosen) - set(STAGES))
    return tuple(filter(chosen.__contains__, STAGES))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.mini", description=__doc__)
    parser.add_argument(
        "--train", nargs="+", default=["data/rendered/train"], help="rendered sets (default %(default)s)"
    )
    parser.add_argument("--heldout", default="data/rendered/heldout", help="set to measure on (default %(default)s)")
    parser.add_argument("--start", type=Path, help="an earlier family whose weights to begin with, as data/models")
    parser.add_argument("--out", type=Path, default=Path("data/models"), help="published family (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("outputs/mini"), help="checkpoints, curves, staging")
    parser.add_argument("--stage", type=_stages, default=STAGES, help=f"all, or some of {','.join(STAGES)}")
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help="CPU minutes per thread, vae=15,unet=40")
    parser.add_argument("--clip-bpe", type=Path, help="CLIP's merge table or a wheel that holds it (first run only)")
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--cutouts", type=Path, help="matting: a folder of further products, pictures with alpha")
    parser.add_argument("--decoder-only", action="store_true", help="vae: keep the encoder, so that a UNet stays valid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def _stage_tokenizers(clip_bpe: Path | None, sdxl: Family) -> None:
    """The pair from CLIP's merge table, or the one of the family that training starts from."""
    from packshot.errors import PackshotError
    from tools.mini.vocabulary import read_clip_merges, save_clip_tokenizers

    if clip_bpe is not None:
        save_clip_tokenizers(read_clip_merges(clip_bpe), sdxl.staging)
    elif sdxl.start is not None:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(sdxl.start / name, sdxl.staging / name, dirs_exist_ok=True)
    else:
        raise PackshotError("the first run needs CLIP's merge table", hint="pass --clip-bpe, or --start a family")


def _open_family(args: argparse.Namespace, name: str) -> Family:
    """The staging folder of one family; what training starts from need not have it."""
    from tools.mini.folder import RECORD, Family

    start = args.start if args.start and (args.start / name / RECORD).exists() else None
    return Family.open(args.work, args.out, name, start)


def _train(args: argparse.Namespace, stage: str, family: Family) -> None:
    """Train one stage; its part is staged if it is better than the one that is there."""
    from tools.mini.clip import train_clip
    from tools.mini.data import SIZE, Renders
    from tools.mini.florence2 import train_florence
    from tools.mini.judge import train_judge
    from tools.mini.matting import train_matting
    from tools.mini.matting_samples import SIDE
    from tools.mini.mllama import train_mllama
    from tools.mini.unet import train_unet
    from tools.mini.vae import train_vae

    renders = Renders.open(args.train, args.heldout, SIDE if stage == "matting" else SIZE)
    print(f"{len(renders.train)} training and {len(renders.held_out)} held-out scenes", flush=True)
    rest = args.work / stage, args.minutes[stage], args.seed
    if stage == "vae":
        train_vae(renders, family, *rest, channels=args.latent_channels, decoder_only=args.decoder_only)
    elif stage == "matting":
        train_matting(renders, family, *rest, cutouts=args.cutouts)
    else:
        plain = {
            "clip": train_clip,
            "unet": train_unet,
            "florence2": train_florence,
            "mllama": train_mllama,
            "judge": train_judge,
        }
        plain[stage](renders, family, *rest)


def run(args: argparse.Namespace) -> None:
    """Train the chosen stages in order and publish each family that is complete and fits together."""
    import torch

    from tools.mini.card import model_card
    from tools.mini.unet import fits

    torch.set_num_threads(args.threads)
    for stage in args.stage:
        name = FAMILY_OF[stage]
        family = _open_family(args, name)
        if stage == "tokenizer":
            if not (family.staging / "tokenizer_2" / "merges.txt").exists():
                _stage_tokenizers(args.clip_bpe, family)
            continue
        _train(args, stage, family)
        if stage == "judge":
            continue  # it stays in the staging folder: nothing that is shipped may use it
        if name != "sdxl" or fits(family):
            family.publish(model_card(name, family.records))
        else:
            print("sdxl: not published, no UNet of the staged parts; run --stage unet", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line entry; 0 done, 1 failed with a sentence on stderr."""
    args = _arguments(argv)
    from packshot.errors import PackshotError

    try:
        run(args)
    except PackshotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
