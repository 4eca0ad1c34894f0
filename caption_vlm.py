"""Teach a vision-language model to caption scenes, score it, or let it caption a dataset."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("caption_vlm")
