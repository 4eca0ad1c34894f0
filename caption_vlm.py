"""Teach a vision-language model to caption scenes, score it, or let it caption a dataset."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("caption_vlm", "packshot.caption.run:run", __doc__)
