"""Captions from a vision model on an OpenAI-compatible server (vLLM, llama.cpp, a hosted service)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
from openai.types.chat import ChatCompletionContentPartParam
from PIL.Image import Image

from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.target import mark
from packshot.config.schema import CaptionerConfig, Constraint
from packshot.errors import ConfigError
from packshot.imaging.data_url import data_url
from packshot.scene import Scene
from packshot.scene.grammar import HEAD

LONGEST_SIDE = 1024  # px; larger pictures are scaled down, which is enough for a scene
INSTRUCTION = f"""{{prompt}}

Answer with one line in exactly this form, leaving out what cannot be seen:
{HEAD} on <surface>, surrounded by <thing> and <thing>, <what is behind> in the background, <light>, <one word> mood

Never name or describe the product itself, its brand, colour or packaging: it is always "an object"."""


def connect(captioner: CaptionerConfig) -> Captioner:
    """The captioner at ``captioner.endpoint``. The key is OPENAI_API_KEY; your own server often needs none."""
    client = openai.OpenAI(
        base_url=captioner.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4, timeout=120.0
    )
    return Captioner(partial(write_batch, client, captioner), captioner.batch_size, captioner.constraint)


def write_batch(
    client: openai.OpenAI,
    captioner: CaptionerConfig,
    images: Sequence[Image],
    masks: Sequence[Image | None],
    constraint: Constraint,
) -> list[Caption]:
    """A batch, with several requests at once; a request that fails after the client's retries loses its own row only.

    Raises:
        ConfigError: the server refuses the key or does not know the model, which would fail every row.
    """
    shown = mark(images, masks, captioner.product)
    with ThreadPoolExecutor(captioner.endpoint_requests) as pool:
        return list(pool.map(partial(ask, client, captioner, constraint), shown))


def ask(client: openai.OpenAI, captioner: CaptionerConfig, constraint: Constraint, image: Image) -> Caption:
    """One request."""
    text = INSTRUCTION.format(prompt=captioner.prompt)
    content: list[ChatCompletionContentPartParam] = [
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
    if constraint is Constraint.scene:  # the server decodes freely; its text is parsed and rendered in the grammar
        words = Scene.parse(words).scene.render()
    return Caption(words, truncated=choice.finish_reason == "length")
