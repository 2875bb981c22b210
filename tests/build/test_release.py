"""What the release script finds in the way."""

import io
import tarfile

from tests.build.release import ROOT, absolute, lacking, left_out, older_names

METADATA = """Metadata-Version: 2.4
Name: eap-kernels
Version: 1.2.0
Summary: s
Keywords: k
Classifier: c
License-Expression: MIT
License-File: LICENSE
Project-URL: Source, https://example.org
Requires-Python: >=3.10

See [the docs](https://example.org), [here](#there).
"""


def test_nothing_is_in_the_way_of_a_whole_release():
    assert lacking(METADATA, "# Changelog\n\n## 1.2.0 — 2026-12-01\n\n## 1.1.0 — 2026-11-01\n") == []


def test_what_is_missing_is_named():
    poor = METADATA.replace("Keywords: k\n", "") + "[a](docs/a.md) [b](b.md)\n"
    keywords, heading, links = lacking(poor, "# Changelog\n\n## 1.2.0 — unreleased\n")
    assert "Keywords" in keywords
    assert "unreleased" in heading
    assert "2 links" in links and "docs/a.md" in links
    assert len(lacking(METADATA, "## 1.1.0 — 2026-11-01\n")) == 1


def test_links_lead_to_the_files_of_the_commit():
    page = "![a](docs/a.png) [b](docs/b.md#c), [d](#e), [f](https://example.org/f.md)"
    found = absolute(page, "https://example.org/us/it/", "abc")
    assert found.startswith(
        "![a](https://example.org/us/it/raw/abc/docs/a.png) [b](https://example.org/us/it/blob/abc/docs/b.md#c)"
    )
    assert "[d](#e), [f](https://example.org/f.md)" in found
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    changelog = "## 1.2.0 — 2026-12-01\n"
    assert len(lacking(METADATA + readme, changelog)) == 1
    assert lacking(METADATA + absolute(readme, "https://example.org/us/it", "abc"), changelog) == []


def test_sources_that_are_not_packed_are_named(tmp_path):
    path = tmp_path / "x-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x-1/csrc/a.cpp"), io.BytesIO())
    assert left_out(path, ["csrc/a.cpp", "csrc/b.h", "docs/c.md"]) == ["csrc/b.h"]


def test_functions_are_named_in_the_newest_version_that_old_systems_have():
    needed = " U pthread_join\n U free\n U new_only\n U newer\n"
    offered = """
000000000008ab80 T pthread_join@@GLIBC_2.34
000000000008ab80 T pthread_join@GLIBC_2.2.5
000000000008ab80 T pthread_create@@GLIBC_2.34
000000000008ab80 T pthread_create@GLIBC_2.2.5
0000000000098e30 T free@@GLIBC_2.2.5
0000000000098e30 T new_only@@GLIBC_2.36
0000000000098e30 W newer@@GLIBC_2.32
0000000000098e30 W newer@GLIBC_2.14
0000000000098e30 W newer@GLIBC_2.3.4
"""
    assert older_names(needed, offered) == {"pthread_join": "GLIBC_2.2.5", "newer": "GLIBC_2.14"}
