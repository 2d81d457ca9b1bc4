"""What mkdocs does beside its plugins: pages from the repository's root, and copies of files outside of docs/.

On a code host the documents link to files such as `../examples/fashion_mnist.py`. The site has copies of these files,
so that its links work without a network.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, and the files that any page links to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(lambda match: _moved(match, "."), text)))
    for page in files.documentation_pages():
        for target in re.findall(LINK, page.content_string):
            path = _path(target, posixpath.join("docs", posixpath.dirname(page.src_uri)))
            copy = _address(path)
            if copy.startswith("repository/") and (ROOT / path).is_file() and files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """Points links that leave docs/ to the pages and copies that the site has of their files."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    if page.file.src_uri in PAGES.values():
        return markdown
    return LINK.sub(lambda match: _moved(match, folder), markdown)


def _moved(match: re.Match, folder: str) -> str:
    """Returns a link of a file in `folder` of the repository as a link of the site's page."""
    site_folder = posixpath.relpath(folder, "docs") if folder != "." else "."
    return f"]({posixpath.relpath(_address(_path(match[1], folder)), site_folder)}"


def _path(target: str, folder: str) -> str:
    """Returns the path in the repository of the file to which `folder` has the link `target`."""
    return posixpath.normpath(posixpath.join(folder, target))


def _address(path: str) -> str:
    """Returns the place in the site, seen from its root, of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
