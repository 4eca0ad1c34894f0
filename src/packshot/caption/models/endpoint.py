"""Captions from a vision model on an OpenAI-compatible server (vLLM, llama.cpp, a hosted service)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import openai
from openai.types.chat import ChatCompletionContentPartParam
from openai.types.shared_params import ResponseFormatJSONSchema
from PIL.Image import Image

from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.target import mark
from packshot.config.schema import CaptionerConfig, Constraint
from packshot.errors import ConfigError
from packshot.imaging.data_url import data_url
from packshot.runs.folder import log
from packshot.scene import SLOTS, Scene
from packshot.scene.grammar import HEAD

LONGEST_SIDE = 1024  # px; larger pictures are scaled down, which is enough for a scene
RULE = """Never name or describe the product itself, its brand, colour or packaging: it is always "an object"."""
IN_WORDS = f"""{{prompt}}

Answer with one line in exactly this form, leaving out what cannot be seen:
{HEAD} on <surface>, surrounded by <thing> and <thing>, <what is behind> in the background, <light>, <one word> mood

{RULE}"""
IN_FIELDS = f"""{{prompt}}

Answer with a JSON object of these fields; null, or an empty list, for what cannot be seen:
{{fields}}

{RULE}"""
FIELD_TOKENS = 64  # what the fields' names, quotes and brackets take, besides the words of a caption
MOST_THINGS = 6  # values of a slot that takes several
PHRASE = {"type": "string", "pattern": "^[A-Za-z]+([ '-][A-Za-z]+)*$", "maxLength": 80}


def scene_schema() -> dict[str, object]:
    """The JSON schema of a Scene's slots, for a server that decodes under one."""
    properties: dict[str, object] = {}
    for name, slot in SLOTS.items():
        if slot.many:
            properties[name] = {"type": "array", "items": PHRASE, "maxItems": MOST_THINGS}
        elif name == next(iter(SLOTS)):  # the surface, which every caption has
            properties[name] = PHRASE
        else:
            properties[name] = {"anyOf": [PHRASE, {"type": "null"}]}
    return {"type": "object", "properties": properties, "required": list(SLOTS), "additionalProperties": False}


def slot_lines() -> str:
    """A line on each field of the schema, for the instruction."""
    lines = []
    for name, slot in SLOTS.items():
        lines.append(f'"{name}": {slot.help}, such as "{slot.example}"')
    return "\n".join(lines)


def response_format() -> ResponseFormatJSONSchema:
    """What asks a server to decode under the schema."""
    return {"type": "json_schema", "json_schema": {"name": "scene", "schema": scene_schema(), "strict": True}}


@dataclass
class Endpoint:
    """A model on a server, and what is known of it.

    slots: as many as requests may be under way; preparing a picture takes none.
    guided: whether requests ask for decoding under the schema.
    """

    client: openai.OpenAI
    captioner: CaptionerConfig
    slots: threading.BoundedSemaphore
    guided: bool
    refusal: threading.Lock = field(default_factory=threading.Lock)

    def give_up_guidance(self, reason: str) -> None:
        """Ask for no schema any more: this server knows none. It is told once."""
        with self.refusal:
            if self.guided:
                log.warning(
                    "captioner.endpoint=%s takes no JSON schema (%s): its captions are decoded freely and parsed",
                    self.captioner.endpoint,
                    reason[:160],
                )
            self.guided = False


def connect(captioner: CaptionerConfig) -> Captioner:
    """The captioner at ``captioner.endpoint``. The key is OPENAI_API_KEY; your own server often needs none.

    A few threads more than ``captioner.endpoint_requests`` prepare pictures, so that the requests never wait for that.
    """
    client = openai.OpenAI(
        base_url=captioner.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4, timeout=120.0
    )
    allowed = captioner.endpoint_requests
    endpoint = Endpoint(client, captioner, threading.BoundedSemaphore(allowed), captioner.endpoint_guided)
    return Captioner(
        partial(write_one, endpoint),
        batch_size=1,
        constraint=captioner.constraint,
        at_once=allowed + max(1, allowed // 4),
        longest_side=LONGEST_SIDE,
    )


def write_one(
    endpoint: Endpoint, images: Sequence[Image], masks: Sequence[Image | None], constraint: Constraint
) -> list[Caption]:
    """The caption of one picture; a request that fails after the client's retries loses its own row only.

    Raises:
        ConfigError: the server refuses the key or does not know the model, which would fail every row.
    """
    captioner = endpoint.captioner
    (shown,) = mark(images, masks, captioner.product)
    url = data_url(shown.convert("RGB"), LONGEST_SIDE, quality=92)
    try:
        with endpoint.slots:
            guided = endpoint.guided and constraint is Constraint.scene
            try:
                return [ask(endpoint, constraint, url, guided)]
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not guided:
                    raise
                caption = ask(endpoint, constraint, url, guided=False)
                endpoint.give_up_guidance(error.message)  # without the schema it answers, so that was the reason
                return [caption]
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise ConfigError(
            f"captioner.endpoint={captioner.endpoint} refuses: {error.message}",
            f"Is captioner.endpoint_model={captioner.endpoint_model} served there, and OPENAI_API_KEY right?",
        ) from error
    except openai.OpenAIError as error:
        return [Caption("", truncated=False, error=f"{type(error).__name__}: {error}")]


def ask(endpoint: Endpoint, constraint: Constraint, url: str, guided: bool) -> Caption:
    """One request. guided: ask for the fields of a scene, under their schema."""
    captioner = endpoint.captioner
    instruction = IN_FIELDS if guided else IN_WORDS
    text = instruction.format(prompt=captioner.prompt, fields=slot_lines())
    content: list[ChatCompletionContentPartParam] = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    answer = endpoint.client.chat.completions.create(
        model=str(captioner.endpoint_model),
        messages=[{"role": "user", "content": content}],
        max_tokens=captioner.max_new_tokens + (FIELD_TOKENS if guided else 0),
        temperature=0.0,
        response_format=response_format() if guided else openai.omit,
    )
    choice = answer.choices[0]
    words = (choice.message.content or "").strip()
    if constraint is Constraint.scene:
        words = scene_of(words).render()
    return Caption(words, truncated=choice.finish_reason == "length")


def scene_of(words: str) -> Scene:
    """The scene in an answer: JSON of its slots, or text, which is parsed: some servers ignore the schema."""
    try:
        fields = json.loads(words)
        known = {name: fields[name] for name in SLOTS if fields.get(name)}
        return Scene(**known)
    except (ValueError, TypeError, AttributeError):
        return Scene.parse(words).scene
