"""report.html of a generate.py run: one file without dependencies, thumbnails inside, links to the full pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from packshot.config import conditions
from packshot.config.verify import CHECKS
from packshot.generate.certificate import LAYERS, load_certificates
from packshot.generate.doubt_picture import LEGEND, evidence_text
from packshot.generate.json_types import Json
from packshot.generate.reasons import explained
from packshot.generate.retries import effort
from packshot.imaging.data_url import data_url
from packshot.runs.files import replacing_file

THUMBNAIL = 480  # px, longer side

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a8f4c; --bad: #c2410c; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p.note { opacity: .75; margin: .25rem 0 1rem; max-width: 75ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem; }
.sources { grid-template-columns: repeat(auto-fill, minmax(180px, 240px)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure img { display: block; width: 100%;
background: repeating-conic-gradient(#8883 0 25%, #8881 0 50%) 0 0/18px 18px; }
figcaption { padding: .6rem .8rem; font-size: .86rem; }
.tag { border-radius: 99px; padding: .05rem .6rem; font-weight: 600; color: #fff; background: var(--good); }
.tag.review { background: var(--bad); }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: .5rem 0 0; }
dt { opacity: .65; } dd { margin: 0; overflow-wrap: anywhere; } code { font-size: .92em; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .4rem .7rem .4rem 0;
border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; } .warn { color: var(--bad); font-weight: 600; }
"""


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """Write an HTML document. The title is escaped; the parts of ``body`` are trusted markup, written one by one:
    thumbnails lie inside, and those of a large run together need not fit into memory."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    name = html.escape(title)
    head += f"<title>{name}</title><style>{STYLE}</style>"
    with replacing_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f"<!doctype html><html lang=en><head>{head}</head><body>")
        file.writelines(body)
        file.write("</body></html>")


def picture(file: Path, base: Path, alt: str) -> str:
    """``<img>`` with the thumbnail, linked to the file by a path relative to the report's folder ``base``."""
    with Image.open(file) as image:
        tag = f'<img src="{data_url(image, THUMBNAIL)}" alt="{html.escape(alt)}" loading="lazy">'
    if not file.is_relative_to(base):
        return tag
    return f'<a href="{html.escape(quote(file.relative_to(base).as_posix()))}">{tag}</a>'


def definition_list(entries: Json) -> str:
    """``<dl>`` of escaped texts; empty values are left out."""
    rows = ""
    for key, value in entries.items():
        if value:
            rows += f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
    return f"<dl>{rows}</dl>"


def write_report(folder: Path, baseline: Path | None = None) -> None:
    """Write ``report.html`` for a run folder: per product its photo, cut-out and mask, the request, and all results.

    baseline: an earlier run; where it has a picture of the same name, the two are shown side by side.
    """
    write_page(folder / "report.html", "Packshot report", report_body(folder, baseline))


def report_body(folder: Path, baseline: Path | None) -> Iterator[str]:
    certificates = load_certificates(folder)
    by_product: dict[str, list[str]] = {}
    for stem in certificates:
        by_product.setdefault(stem.rsplit("-", 1)[0], []).append(stem)
    found = effort(certificates)
    review = found["pictures"] - found["accepted"]
    yield (
        "<h1>Packshot</h1>"
        f'<p class="note">Pictures: {len(certificates)}, accepted: {found["accepted"]}, to be reviewed: {review}, '
        f"products: {len(by_product)}. {cost_text(found)} "
        "Core: product pixels with full alpha, less one pixel; compared with the photo on the written file. "
        "Edge: CIEDE2000 to the photo on the product's rim.</p>"
    )
    for name, stems in by_product.items():
        yield product_section(folder, name, [(stem, certificates[stem]) for stem in stems], baseline)


def cost_text(found: Json) -> str:
    """What the pictures took, and what an accepted one did; without seconds, which no resumed run would repeat.

    found: of ``effort``.
    """
    accepted = found["accepted"]
    if not found["steps"] or not accepted:
        return f"Tries: {found['tries']}, denoising steps: {found['steps']}, none for an accepted picture."
    return (
        f"Tries: {found['tries']}. Cost of an accepted picture, those not accepted included: "
        f"{found['tries'] / accepted:.2f} tries, {found['steps'] / accepted:.0f} denoising steps."
    )


def product_section(folder: Path, name: str, results: list[tuple[str, Json]], baseline: Path | None) -> str:
    stem, first = results[0]
    request = first["request"]
    mask = first["mask"]
    scene = {}
    for slot, value in request["scene"].items():
        scene[slot] = ", ".join(value) if isinstance(value, list) else value
    lost = ""
    for words in first["lost_words"].values():
        if words:
            note = f"Beyond the text encoder's 77 tokens, not seen by the model: {html.escape(words)}"
            lost += f'<p class="warn">{note}</p>'
    sources = [
        (next((folder / LAYERS).glob(f"{glob_escape(name)}-input.*"), None), "Photo"),
        (folder / LAYERS / f"{stem}-product.png", "Cut-out, un-mixed from the old background"),
        (folder / LAYERS / f"{stem}-mask.png", f"Mask ({mask['method']}, confidence {mask['confidence']:.2f})"),
        (folder / LAYERS / f"{name}-doubt.png", f"Doubt ({evidence_text(mask.get('evidence') or {})}; {LEGEND})"),
    ]
    figures = ""
    for file, caption in sources:
        if file is not None and file.exists():
            image = picture(file, folder, caption)
            figures += f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
    settings = {"prompt": request["prompt"], "negative prompt": request["negative_prompt"], **scene}
    for asked in conditions.settings().values():
        if request.get(asked.key) is not None:
            settings[asked.label] = f"{request[asked.key]:g} {asked.unit}"
    settings["adapters"] = ", ".join(f"{a['kind']} {a['name']} × {a['scale']:g}" for a in first["model"]["adapters"])
    cards = "".join(result_card(folder, stem, certificate, baseline) for stem, certificate in results)
    return (
        f'<h2>{html.escape(name)}</h2><div class="grid sources">{figures}</div>'
        f'{definition_list(settings)}{lost}<h2>Results</h2><div class="grid">{cards}</div>'
    )


def glob_escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def sharpness_text(refined: Json) -> str:
    """Softness of the background's edges before and after a second pass, and of the product's; nothing without one."""
    if "edge_blur_after" not in refined:  # no second pass, or an older version
        return ""
    before, after, product = (refined[f"edge_blur_{name}"] for name in ("before", "after", "product"))
    return f"edges of the background {before} → {after} px soft, of the product {product} px"


def delivered_text(delivery: Json | None) -> str:
    """The file that was handed over, in a few words; nothing where it is the PNG itself."""
    if delivery is None:
        return ""
    parts = []
    if delivery["quality"] is not None:
        core = delivery["difference"]["core"]["max"]
        parts.append(f"{delivery['file']}, {delivery['bytes']:,} bytes, quality {delivery['quality']}")
        parts.append(f"core differs by up to {core}")
    standard = delivery["standard"]
    if standard is not None:
        missed = [rule for rule, check in standard["checks"].items() if not check["passed"]]
        parts.append(f"{standard['name']}: {'missed ' + ', '.join(missed) if missed else 'kept'}")
    return ", ".join(parts)


def core_share(core: Json) -> str:
    """What the core is of the product, where a certificate states it."""
    return f", {core['share']:.0%} of the product" if core.get("share") is not None else ""


def failed_text(checks: Json) -> str:
    """What the failed checks measured, with their limits."""
    parts = []
    for code, check in checks.items():
        if not check["passed"]:
            note = ", ignored" if check["ignored"] else ""
            parts.append(f"{code} ({CHECKS[code].about}: {check['measured']:g}, limit {check['limit']:g}{note})")
    return "; ".join(parts)


def seed_text(certificate: Json) -> str:
    """The seed, and the tries if there were several."""
    seed = str(certificate["request"]["seed"])
    tries = certificate.get("tries") or []
    if len(tries) < 2:
        return seed
    chosen = certificate["chosen"]
    return f"{seed}; {len(tries)} tries, number {chosen + 1} was taken, of seed {tries[chosen]['seed']}"


def result_card(folder: Path, stem: str, certificate: Json, baseline: Path | None) -> str:
    core = certificate["core"]
    edge = certificate["edge"]
    review = certificate["status"] != "accepted"
    image = picture(folder / f"{stem}.png", folder, stem)
    before = baseline / f"{stem}.png" if baseline else None
    if before is not None and before.exists():
        image = f'<div class="pair">{picture(before, folder, "before")}{image}</div>'
    fit = certificate["colour_fit"]
    details = {
        "before, after": "left, right" if before is not None and before.exists() else "",
        "reasons": explained(certificate["reasons"]),
        "core": f"{core['pixels']:,} px{core_share(core)}, largest difference {core['max_abs_diff']}",
        "edge ΔE": f"median {edge['p50']:.1f}, 95th percentile {edge['p95']:.1f}",
        "colour fit": f"error {fit['error_before']:.3f} → {fit['error_after']:.3f}"
        if fit["applied"]
        else fit["reason"],
        "placement": f"{certificate['transform']['placement']}, resampling {certificate['transform']['resampling']}",
        "failed checks": failed_text(certificate.get("checks") or {}),
        "seed": seed_text(certificate),
        "sharpness": sharpness_text(certificate.get("refined") or {}),
        "shadow": "added" if (certificate.get("shadow") or {}).get("applied") else "",
        "file": delivered_text(certificate.get("delivery")),
    }
    tag = f'<span class="tag{" review" if review else ""}">{"needs review" if review else "accepted"}</span>'
    link = f'<a href="{html.escape(quote(stem))}.json">certificate</a>'
    return f"<figure>{image}<figcaption>{tag} {link}{definition_list(details)}</figcaption></figure>"
