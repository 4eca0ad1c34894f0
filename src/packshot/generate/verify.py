"""``packshot verify IMAGE CERTIFICATE [PHOTO]``: does a picture keep what its certificate states?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError, PackshotError
from packshot.generate.canvas import place_again
from packshot.generate.certificate import digest, measure
from packshot.generate.certificate_schema import Certificate, json_schema, read_certificate
from packshot.generate.product import Product, open_image, prepare
from packshot.runs.arguments import Arguments
from packshot.runs.files import file_sha256


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. passed: whether it holds."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.text}"


def is_delivery(image: Path, certificate: Certificate) -> bool:
    """Whether the picture is the file that was handed over next to the PNG, in a format that loses detail."""
    delivery = certificate.delivery
    return delivery is not None and delivery.quality is not None and file_sha256(image) == delivery.sha256


def check_file(image: Path, certificate: Certificate) -> Finding:
    """Whether the picture is the very file that was measured."""
    if file_sha256(image) == certificate.output_sha256:
        return Finding(True, f"{image.name} is the file that was measured, byte for byte.")
    if is_delivery(image, certificate):
        return Finding(True, f"{image.name} is the file that was handed over, byte for byte.")
    return Finding(False, f"{image.name} is not the file that was measured: it was changed or saved again.")


def check_core(certificate: Certificate) -> Finding:
    """Whether the certificate's own measures agree with each other and show an unchanged core."""
    core = certificate.core
    if not core.pixels:
        return Finding(False, "The product has no opaque core, so nothing of it was compared.")
    unchanged = core.sha256_input == core.sha256_output
    if unchanged != (core.max_abs_diff == 0):
        return Finding(False, "The certificate contradicts itself: the core's hashes and its difference disagree.")
    if not unchanged:
        return Finding(False, f"The certificate states that the core differs by up to {core.max_abs_diff} of 255.")
    covered = "" if core.share is None else f", {core.share:.0%} of the product by {certificate.mask.source},"
    return Finding(True, f"The certificate states that {core.pixels:,} px{covered or ' of the product'} are unchanged.")


def find_product(photo: Path, mask: Path | None, certificate: Certificate, matte: MatteConfig) -> Product:
    """The product with the certificate's own mask.

    Raises:
        PackshotError: the mask was a file that is not given, or another mask is found now.
    """
    stated = certificate.mask
    if mask is None and stated.file_sha256 is not None:
        raise PackshotError("The mask was a file.", "Name it with --mask.")
    product = prepare(photo, mask, replace(matte, min_confidence=0.0))
    if digest(product.alpha_HW) != stated.sha256:
        raise PackshotError(
            f"The mask is not the one that the certificate names (method {stated.method}).",
            "Name its file with --mask, or the network that found it with --matte.",
        )
    return product


def check_photo(
    image: Path, photo: Path, mask: Path | None, certificate: Certificate, matte: MatteConfig
) -> Iterator[Finding]:
    """Measure picture and photo again."""
    hashes = {file_sha256(photo), digest_of_pixels(photo)}
    same = certificate.input.sha256 in hashes
    yield Finding(same, f"{photo.name} is {'the' if same else 'not the'} photograph that was used.")
    try:
        product = find_product(photo, mask, certificate, matte)
    except PackshotError as error:
        yield Finding(False, f"The product was not compared. {error.args[0]} {error.hint}")
        return
    try:
        canvas = place_again(product, certificate.transform.model_dump())
        measured = measure(image.read_bytes(), canvas)
    except ValueError as error:
        yield Finding(False, f"The product was not compared: {error}.")
        return
    core = measured["core"]
    if is_delivery(image, certificate):
        yield check_delivered_core(core["max_abs_diff"] or 0, certificate)
        return
    if core["max_abs_diff"] == 0:
        yield Finding(True, f"All {core['pixels']:,} px of the product's core are the photograph's.")
    else:
        yield Finding(
            False, f"The product's core differs from the photograph's by up to {core['max_abs_diff']} of 255."
        )
    stated = certificate.core.model_dump(include=set(core), exclude_unset=True)  # older ones state less
    agrees = stated == {key: core[key] for key in stated}
    yield Finding(agrees, f"The measures of the core are {'' if agrees else 'not '}those of the certificate.")


def check_delivered_core(difference: int, certificate: Certificate) -> Finding:
    """Whether the core of a file with loss differs from the photograph no more than stated.

    Decoders round a pixel up or down, so one step of 255 more is not a change of the file.
    """
    assert certificate.delivery is not None
    stated = certificate.delivery.difference.core.max
    holds = difference <= stated + 1
    return Finding(
        holds,
        f"The core of the file that was handed over differs from the photograph by up to {difference} of 255; "
        f"the certificate states {stated}.",
    )


def digest_of_pixels(photo: Path) -> str:
    """What identifies a photograph that was handed over as a picture in memory."""
    return open_image("PHOTO", open_image("PHOTO", photo).image).sha256


def verify(
    image: str | Path,
    certificate: str | Path,
    photo: str | Path | None = None,
    mask: str | Path | None = None,
    matte: MatteConfig | None = None,
) -> list[Finding]:
    """Check a picture against its certificate; it holds if every finding has passed.

    photo: also measure the product's pixels again. mask: the mask's file, if one was given then. matte: how the mask
    was found, if not by the defaults.

    Raises:
        PackshotError: a file is missing, or the certificate is not one.
    """
    for path in filter(None, (image, certificate, photo, mask)):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: there is no such file.", "packshot verify IMAGE CERTIFICATE [PHOTO]")
    stated = read_certificate(Path(certificate))
    findings = [check_file(Path(image), stated), check_core(stated)]
    if photo is not None:
        mask_file = None if mask is None else Path(mask)
        findings += check_photo(Path(image), Path(photo), mask_file, stated, matte or MatteConfig())
    return findings


def main(arguments: Sequence[str]) -> None:
    """``packshot verify``.

    Raises:
        ConfigError: the arguments do not fit.
        PackshotError: a check failed.
    """
    parser = Arguments(prog="packshot verify")
    parser.add_argument("image", nargs="?")
    parser.add_argument("certificate", nargs="?")
    parser.add_argument("photo", nargs="?")
    parser.add_argument("--mask", help="the mask's file")
    parser.add_argument("--matte", default="auto", help="matte.model that found the mask")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of certificates")
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(json_schema(), indent=2))
        return
    if given.certificate is None:
        parser.error("name the picture and its certificate")
    matte = MatteConfig(model=given.matte)
    matte.check()
    findings = verify(given.image, given.certificate, given.photo, given.mask, matte)
    print("\n".join(map(str, findings)))
    failed = sum(not finding.passed for finding in findings)
    if failed:
        raise PackshotError(f"{given.image}: {failed} of {len(findings)} checks failed.")
