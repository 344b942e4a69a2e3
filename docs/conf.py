"""The pages by Sphinx: ``make docs``."""

import re

project = html_title = "flagops"
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 3
html_theme = "furo"
html_show_sphinx = html_show_copyright = False
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True


def named(link):
    text, path = link.groups()
    return f"`{path}`" if text in path else f"{text}: `{path}`"


def outside(app, page, source):
    """What lies outside of the pages is named by its path in a checkout: no page can be opened there."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", named, source[0])


def setup(app):
    app.connect("source-read", outside)
