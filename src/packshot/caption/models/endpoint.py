"""Captions from a vision model behind an OpenAI-compatible server (vLLM, llama.cpp, a hosted service)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
from PIL.Image import Image

from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.target import mark
from packshot.config.schema import CaptionerConfig, Constraint, ProductTarget
from packshot.errors import ConfigError
from packshot.imaging.data_url import data_url
from packshot.scene import Scene
from packshot.scene.grammar import HEAD

LONGEST_SIDE = 1024  # px; larger pictures are sent smaller, a scene needs no more
_INSTRUCTION = f"""{{prompt}}

Answer with one line in exactly this form, leaving out what cannot be seen:
{HEAD} on <surface>, surrounded by <thing> and <thing>, <what is behind> in the background, <light>, <one word> mood

Never name or describe the product itself, its brand, colour or packaging: it is always "an object"."""


def connect(captioner: CaptionerConfig) -> Captioner:
    """The captioner at ``captioner.endpoint``. The key is OPENAI_API_KEY; servers of one's own often need none.

    Raises:
        ConfigError: no address or no model name, or a way of pointing out the product that needs the model itself.
    """
    if not captioner.endpoint or not captioner.endpoint_model:
        raise ConfigError(
            "captioner=endpoint needs captioner.endpoint and captioner.endpoint_model.",
            "For example captioner.endpoint=http://127.0.0.1:8001/v1 captioner.endpoint_model=qwen2.5-vl-7b.",
        )
    if captioner.product is ProductTarget.box:
        raise ConfigError("captioner.product=box is Florence-2's.", "Use captioner.product=outline or mask.")
    client = openai.OpenAI(
        base_url=captioner.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4, timeout=120.0
    )
    return Captioner(partial(_write, client, captioner), captioner.batch_size, captioner.constraint)


def _write(
    client: openai.OpenAI,
    captioner: CaptionerConfig,
    images: Sequence[Image],
    masks: Sequence[Image | None],
    constraint: Constraint,
) -> list[Caption]:
    """A batch, several requests at once; what fails after the client's retries costs its own row only.

    Raises:
        ConfigError: the server refuses the key or does not know the model, as it would for every row.
    """
    shown = mark(images, masks, captioner.product)
    with ThreadPoolExecutor(captioner.endpoint_requests) as pool:
        return list(pool.map(partial(_ask, client, captioner, constraint), shown))


def _ask(client: openai.OpenAI, captioner: CaptionerConfig, constraint: Constraint, image: Image) -> Caption:
    text = _INSTRUCTION.format(prompt=captioner.prompt)
    content: list[Any] = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(image.convert("RGB"), LONGEST_SIDE, quality=92)}},
    ]
    try:
        answer = client.chat.completions.create(
            model=str(captioner.endpoint_model),
            messages=[{"role": "user", "content": content}],
            max_tokens=captioner.max_new_tokens,
            temperature=0.0,
        )
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise ConfigError(
            f"captioner.endpoint={captioner.endpoint} refuses: {error.message}",
            f"Is captioner.endpoint_model={captioner.endpoint_model} served there, and OPENAI_API_KEY right?",
        ) from error
    except openai.OpenAIError as error:
        return Caption("", truncated=False, error=f"{type(error).__name__}: {error}")
    choice = answer.choices[0]
    words = (choice.message.content or "").strip()
    if constraint is Constraint.scene:  # its decoding is out of reach: what it says is read, and written anew
        words = Scene.parse(words).scene.render()
    return Caption(words, truncated=choice.finish_reason == "length")
