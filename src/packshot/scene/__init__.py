"""Scenes: the one vocabulary that data, captions, prompts, renders and scores share."""

from packshot.scene.grammar import Parsed, SceneSyntaxError
from packshot.scene.scene import SLOTS, Scene

__all__ = ["SLOTS", "Parsed", "Scene", "SceneSyntaxError"]
