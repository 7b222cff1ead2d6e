"""HTML of chat pages becomes what the model wrote; what people wrote stays theirs."""

from __future__ import annotations

import pytest

from longalign.data.messages import BadSample
from longalign.data.sources.html import is_html, to_markdown, without_buttons

CODE_BOX = (
    '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center"><span class="">python</span>'
    '<button class="flex ml-auto gap-2"><svg><path d="M16"></path></svg>Copy code</button></div>'
    '<div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs language-python">'
    '<span class="hljs-keyword">def</span> f(a_b):\n    <span>return</span> a_b &lt; 1 ** 2\n\n    # *x*\n</code></div></div></pre>'
)
PYTHON = "```python\ndef f(a_b):\n    return a_b < 1 ** 2\n\n    # *x*\n```"
MATH = (
    '<span class="math math-inline"><span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi>'
    '<annotation encoding="application/x-tex">x_1^2</annotation></semantics></math></span>'
    '<span class="katex-html" aria-hidden="true"><span>x</span><span>2</span></span></span></span>'
)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        (f"<div class='markdown prose'><p>Use <code>a_b</code>:</p>{CODE_BOX}<p>Done.</p></div>", f"Use `a_b`:\n\n{PYTHON}\n\nDone."),
        ("<pre><code>  a\n    b\n</code></pre>", "```\n  a\n    b\n```"),
        ("<pre>pythonCopy code\nx = 1</pre>", "```python\nx = 1\n```"),
        ("<pre><code>```\nin\n```</code></pre>", "````\n```\nin\n```\n````"),
        ("<ol><li><p>One</p><ul><li>in</li></ul></li><li>Two</li></ol>", "1. One\n\n   - in\n2. Two"),
        ('<ol start="3"><li>c</li><li>d</li></ol>', "3. c\n4. d"),
        ("<h2>Head</h2><p>a<br>b <strong>c</strong></p>", "## Head\n\na\nb **c**"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2<br>3</td></tr></table>", "| a | b |\n| --- | --- |\n| 1 | 2 3 |"),
        (f"<p>so {MATH} holds</p>", "so $x_1^2$ holds"),
        (f"<div><span class='katex-display'>{MATH[31:-7]}</span></div>", "$$x_1^2$$"),
        ("<p>2 * 3 * 4 &lt; snake_case_name &amp; #1 &lt;b&gt;</p>", "2 * 3 * 4 < snake_case_name & #1 <b>"),
        ('<div class="flex whitespace-pre-wrap">a\n  b\n\n\nc &lt;d&gt;</div>', "a\n  b\n\n\nc <d>"),
        ('<div class="x"><span>2 / 3</span></div><p>yes</p>', "yes"),
        ("<p>你好，<em>世界</em></p>", "你好，*世界*"),
        # broken
        ("<p>a<ul><li>b<li>c", "a\n\n- b- c"),
        ("</div>x</p> y", "x y"),
        ("<p>a < b and c > d</p>", "a < b and c > d"),
        ("<p>a</p><pre><code>x = 1", "a\n\n```\nx = 1\n```"),
        ("<div></div>", ""),
    ],
)  # fmt: skip
def test_to_markdown(html: str, text: str) -> None:
    assert to_markdown(html) == text


def test_absurd_nesting_drops_the_record() -> None:
    with pytest.raises(BadSample, match="nested too deep"):
        to_markdown("<div>" * 20_000 + "x")


@pytest.mark.parametrize(
    ("text", "role", "expected"),
    [
        ("<p>yes</p>", "assistant", True),
        ("\n<DIV class='x'>yes", "assistant", True),
        ("<pre><code>", "assistant", True),
        ("Use <p> for paragraphs", "assistant", False),
        ("<stdio.h> is a header", "assistant", False),
        ("<preview> a", "assistant", False),
        ("```html\n<p>", "assistant", False),
        ("<p>What is wrong with this?</p>", "user", False),
        ("<div class='nav'>What is wrong with this?</div>", "user", False),
        ('<div class="min-h-[20px] flex whitespace-pre-wrap">hello</div>', "user", True),
    ],
)
def test_is_html(text: str, role: str, expected: bool) -> None:
    assert is_html(text, role) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```\npythonCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("```pythonCopy codex = 1\n```", "```python\nx = 1\n```"),
        ("  ```\n  c++Copy code\n  x\n  ```", "  ```c++\n  x\n  ```"),
        ("So:\n\nbashCopy code\nls", "So:\n\nls"),
        ("Press Copy code to copy.", "Press Copy code to copy."),
        ("```python\nx = 1\n```", "```python\nx = 1\n```"),
    ],
)
def test_buttons_go(text: str, expected: str) -> None:
    assert without_buttons(text) == expected
