"""Take the README's picture of the page, from an endpoint that is up.

python docs/picture.py http://127.0.0.1:8000 docs/images/page.png
"""

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

FRAGMENT = "q=Where+can+I+buy+a+tennis+ball%3F&p=0.6&as=chat&m=base,linear,cat"
PATIENCE_MS = 120_000


def take(url: str, path: str) -> None:
    """Ask, wait for the answers, and write the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1860})
        page.goto(f"{url}/#{FRAGMENT}")
        expect(page.locator("textarea")).not_to_have_value("", timeout=PATIENCE_MS)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#status")).to_have_text("Done", timeout=PATIENCE_MS)
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    take(*sys.argv[1:])
