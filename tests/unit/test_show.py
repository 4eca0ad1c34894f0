"""``packshot show``: one row of a dataset, chosen by number or id."""

import pytest
from PIL import Image

from packshot.cli import run_command
from packshot.dataset.rows import load_rows
from packshot.dataset.show import read_arguments, show
from packshot.errors import ConfigError

HELDOUT = "data/rendered/heldout"


def test_a_row_by_number_and_by_the_start_of_its_id(tmp_path):
    rows = load_rows("data.train", HELDOUT, pictures=("image",))
    by_number = show(read_arguments([HELDOUT, "3"]))
    assert by_number == show(read_arguments([HELDOUT, f"show.id={rows.ids[3][:12]}"]))
    assert by_number == show(read_arguments([HELDOUT, "show.index=3"]))
    text = "\n".join(by_number)
    assert by_number[0] == f"row 3 of {len(rows)} in {HELDOUT}"
    assert rows.texts[3] in text
    assert rows.ids[3] in text
    assert rows[3]["scene"].surface in text


def test_the_pictures_of_a_row_are_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("show", [HELDOUT, f"show.out={tmp_path}"])
    assert ended.value.code == 0
    rows = load_rows("data.train", HELDOUT)
    stem = rows.ids[0][:16]
    assert {f"{stem}-image.png", f"{stem}-mask.png"} <= {file.name for file in tmp_path.iterdir()}
    assert Image.open(tmp_path / f"{stem}-image.png").size == rows[0]["image"].size
    assert f"wrote {tmp_path}/{stem}-image.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs a dataset"),
        ([HELDOUT, "show.index=9999"], "show.index=9999: .* rows"),
        ([HELDOUT, "show.index=x"], "show.index=x is not a row"),
        ([HELDOUT, "show.id=zzz"], "show.id=zzz: no row"),
        ([HELDOUT, "show.idx=1"], "There is no key 'show.idx'"),
        ([HELDOUT, "1", "show.id=a"], "both name a row"),
        (["no/such/set"], "no such file or folder"),
    ],
)
def test_what_names_no_row_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        show(read_arguments(arguments))
