"""Train a LoRA of SDXL on scenes."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("train_lora")
