"""Keys of merge.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from packshot.config.common import LicenseConfig, Script
from packshot.config.train import ExportConfig


@dataclass
class Merge(Script):
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
