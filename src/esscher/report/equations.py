r"""Equations as the docstrings write them, turned into LaTeX, and LaTeX into MathML.

Docstrings write equations as lines of plain text, indented by four columns:

    L = -E log sigma(beta f'(u_chosen) - beta f'(u_rejected))

Scripts stand after `_` and `^` and end at a space; what belongs together is in braces, or follows a
comma, minus or tilde without a space (J_D,i, G_T-1, E_S~P). `given` and ` | ` are the bar of a
condition, `f*(` a conjugate, `D+` a raised sign, `A-hat` and `Qbar` accents, ` . ` a product. Names of
Greek letters are these letters; other words of two or more letters stay words. Two or more spaces
part what belongs side by side.
"""

import re
from collections.abc import Iterator

GREEK = frozenset(
    {"alpha", "beta", "gamma", "delta", "eps", "epsilon", "zeta", "eta", "theta", "iota", "kappa"}
    | {"lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"}
    | {"Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega"}
)
LATEX_KNOWS = ("log", "exp", "min", "max", "sup", "inf")
UPRIGHT = ("clip", "floor", "logit", "mean", "norm", "softplus", "sg", "std", "KL")
FUNCTIONS = {
    **{name: rf"\{name}" for name in LATEX_KNOWS},
    **{name: rf"\operatorname{{{name}}}" for name in UPRIGHT},
    "sum": r"\sum",
    "grad": r"\nabla",
}
OPERATORS = {
    "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "->": r"\to ", "+-": r"\pm ", "~": r"\sim ",
    "||": r"\,\Vert\,", "|": r"\vert ", "...": r"\dots ", "*": r"\ast ",
    "{": r"\{", "}": r"\}", "%": r"\%", "#": r"\#", "&": r"\&",
}  # fmt: skip
ACCENTS = ("hat", "bar", "tilde")
TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<quoted>"[^"]*")
    | (?P<number>\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?!\w))
    | (?P<name>[A-Za-z]+)
    | (?P<sign><=|>=|!=|->|\+-|\|\||\.\.\.|.)""",
    re.VERBOSE,
)
JOINED = re.compile(r"(\\text\{[^{}]*)\}\\ \\text\{")
BAR = re.compile(
    r'<mover>(<mrow>(?:(?!<mover>).)*?</mrow>)<mo stretchy="true">&#x000AF;</mo></mover>'
)
FUNCTION_NAME = re.compile(r"<(mi|mo)>([A-Za-z]{2,})</\1>")
WORDS = re.compile(r"[A-Za-z][A-Za-z'-]*")


def latex_of(line: str) -> str:
    """One line of an equation as LaTeX; pieces that are sentences stay as they are."""
    pieces = re.split(r"\s{2,}(?![=\s])", line.strip())
    return r" \quad ".join(_words(p) if is_prose(p) else _Reader(p).all() for p in pieces)


def is_prose(piece: str) -> bool:
    """Whether a piece is a sentence: three words in a row, or two and nothing of an equation.

    What begins as an equation does not become a sentence by its conditions.
    """
    if re.match(r"[^\s=]{1,12} +=\s", piece):
        return False
    return _run_of_words(piece) >= (3 if re.search(r"[_^=\[(]", piece) else 2)


def symbols_of(cell: str) -> str:
    """A cell of a symbol table: its formulas between dollar signs, its words as they are."""
    pieces = re.split(r"([,;:] (?![^(]*\)))", cell)
    return "".join(f"${latex_of(piece)}$" if is_symbol(piece) else piece for piece in pieces)


def is_symbol(text: str) -> bool:
    """Whether text is a formula: no two words in a row, and something to set."""
    names = re.findall(r"[A-Za-z]+", text)
    known = any(len(name) == 1 or name in GREEK or _bar(name) for name in names)
    return known and not text.startswith("a ") and _run_of_words(text, whole=True) < 2


def _bar(name: str) -> str:
    """The letter of a name such as Qbar; nothing for any other."""
    return name[0] if len(name) == 4 and name.endswith("bar") else ""


def with_equations(text: str) -> str:
    """Markdown whose indented lines are display equations between dollar signs."""
    parts: list[str] = []
    for block in re.split(r"\n{2,}", text):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            rows = [_indent(line[4:]) + latex_of(line) for line in lines]
            body = rows[0] if len(rows) == 1 else _array(rows)
            parts.append(f"$$\n{body}\n$$")
        else:
            parts.append(block)
    return "\n\n".join(parts)


def mathml(latex: str, *, block: bool) -> str:
    """MathML of a formula; `block` sets it on lines of its own.

    Three things are set otherwise than the converter does, for fonts that are not made for mathematics:
    primes stand on the line, since their glyph is raised already; bars do not stretch, and have a class
    by which the site's style draws them; and names of functions have room on both sides.
    """
    from latex2mathml.converter import convert

    unraised = re.sub(r"'+", lambda primes: r"{\prime}" * len(primes[0]), _outside_text(latex))
    found = convert(unraised, display="block" if block else "inline")
    found = BAR.sub(r'<mover class="bar">\1<mo stretchy="false">&#x000AF;</mo></mover>', found)
    return FUNCTION_NAME.sub(r'<mo lspace="0.17em" rspace="0.17em">\2</mo>', found)


def _outside_text(latex: str) -> str:
    """LaTeX whose words have typographic apostrophes, so that those left are primes."""
    return re.sub(r"\\text\{[^{}]*\}", lambda words: words[0].replace("'", "\u2019"), latex)


def _array(rows: list[str]) -> str:
    return "\\begin{array}{l}\n" + " \\\\\n".join(rows) + "\n\\end{array}"


def _indent(line: str) -> str:
    return r"\quad " * min((len(line) - len(line.lstrip())) // 4, 3)


def _run_of_words(text: str, *, whole: bool = False) -> int:
    """The longest run of words of two letters or more that are no names of an equation.

    Punctuation ends a run, unless the text is one `whole`, in which names of functions are words too.
    """
    longest = run = 0
    for part in text.split():
        word = part.strip(",.;:()")
        known = word in GREEK or (word in FUNCTIONS and not whole)
        run = run + 1 if WORDS.fullmatch(word) and len(word) > 1 and not known else 0
        longest = max(longest, run)
        if part.endswith((",", ";", ":")) and not whole:
            run = 0
    return longest


def _words(text: str) -> str:
    return rf"\text{{{text}}}"


class _Reader:
    """Reads one piece from left to right."""

    def __init__(self, text: str):
        self.tokens = [(str(m.lastgroup), m.group()) for m in TOKEN.finditer(text)]
        self.place = 0

    def all(self) -> str:
        text = re.sub(r" +(?=[ _^}])", "", "".join(self._parts())).strip()
        while (joined := JOINED.sub(r"\1 ", text)) != text:
            text = joined
        return text

    def _parts(self) -> Iterator[str]:
        while self.place < len(self.tokens):
            yield self._space() if self._kind() == "space" else self._scripted()

    def _kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place][0] if 0 <= place < len(self.tokens) else ""

    def _text(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place][1] if 0 <= place < len(self.tokens) else ""

    def _take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1][1]

    def _space(self) -> str:
        """A space is seen beside words only; elsewhere the operators decide."""
        before, after = (self._is_word(step) for step in (-1, 1))
        self.place += 1
        return r"\ " if before or after else " "

    def _is_word(self, ahead: int) -> bool:
        text = self._text(ahead)
        if self._kind(ahead) != "name" or self._text(ahead - 1) == "_":
            return False
        return len(text) > 1 and not self._known(text) and text != "given" and not _bar(text)

    @staticmethod
    def _known(name: str) -> bool:
        return name in GREEK or name in FUNCTIONS or name == "sqrt"

    def _scripted(self) -> str:
        """An atom with its accents, primes, raised signs and scripts."""
        if self._kind() == "name" and (words := self._snake()):
            return words
        kind, atom = self._kind(), self._atom()
        if kind == "name":
            atom = self._accented(atom)
        lower = upper = ""
        while True:
            text, after = self._text(), self._text(1)
            if text == "'" and atom:
                upper += self._take()
            elif text == "_" and self._kind(1) != "space" and after:
                self.place += 1
                lower += self._script()
            elif text == "^" and after:
                self.place += 1
                upper += self._script(raised=True)
            elif kind == "name" and text == "*" and (after in ("(", "_") or self._ends(1)):
                self.place += 1
                upper += r"\ast"
            elif kind == "name" and text in ("+", "-") and self._ends(1):
                upper += self._take()
            else:
                break
        return atom + (f"_{{{lower}}}" if lower else "") + self._raised(upper)

    @staticmethod
    def _raised(upper: str) -> str:
        primes = len(upper) - len(upper.lstrip("'"))
        rest = upper[primes:]
        if not rest:
            return "'" * primes
        return "^{" + r"\prime" * primes + rest + "}"

    def _ends(self, ahead: int) -> bool:
        """Whether a sign is attached to what stands before it, and nothing follows."""
        text = self._text(ahead)
        return text in ("", ")", "]", "_", ",", ";") or self._kind(ahead) == "space"

    def _snake(self) -> str:
        """A variable of several words, such as gan_weight: a word, not a letter with a script."""
        first, words, ahead = self._text(), [self._text()], 1
        if len(first) < 2 or self._known(first):
            return ""
        while self._text(ahead) == "_" and len(self._text(ahead + 1)) > 2:
            words.append(self._text(ahead + 1))
            ahead += 2
        if len(words) == 1 or "hat" in words[1:] or self._kind(ahead - 1) != "name":
            return ""
        self.place += ahead
        return _words("_".join(words))

    def _accented(self, atom: str) -> str:
        if self._text() in ("-", "_") and self._text(1) in ACCENTS:
            self.place += 1
            return rf"\{self._take()}{{{atom}}}"
        return atom

    def _atom(self) -> str:
        kind, text = self._kind(), self._text()
        if kind == "name":
            return self._name()
        self.place += 1
        if kind == "quoted":
            return _words(text)
        if kind == "number" and "e" in text:
            digits, _, power = text.partition("e")
            return ("" if digits == "1" else rf"{digits} \cdot ") + f"10^{{{power}}}"
        if text == "|" and self._kind(-2) == "space" and self._kind() == "space":
            return r"\mid "
        if text == "." and self._kind(-2) == "space" and self._kind() == "space":
            return r"\cdot "
        if text == "<" and self._closes(">"):
            return r"\langle "
        if text == ">" and self._kind() in ("space", "sign", "") and self._kind(-2) != "space":
            return r"\rangle "
        return OPERATORS.get(text, text)

    def _closes(self, sign: str) -> bool:
        """Whether a bracket that opens here, right before a name, is closed further on."""
        rest = [text for _, text in self.tokens[self.place :]]
        return self._kind() == "name" and sign in rest

    def _name(self) -> str:
        text = self._take()
        if text == "given":
            return r"\mid "
        if text == "proportional" and self._text(1) == "to":
            self.place += 2
            return r"\propto "
        if text == "E" and self._expects():
            return r"\mathbb{E}"
        if text == "sqrt" and self._text() == "(":
            return rf"\sqrt{{{self._group()}}}"
        if letter := _bar(text):
            return rf"\bar{{{letter}}}"
        if text in GREEK:
            letter = rf"\{'epsilon' if text == 'eps' else text}"
            return f"{letter}_{{{self._take()}}}" if self._indexed() else f"{letter} "
        if text in FUNCTIONS:
            return FUNCTIONS[text] + " "
        if len(text) == 1:
            return f"{text}_{{{self._take()}}}" if self._indexed() else text
        return _words(text)

    def _indexed(self) -> bool:
        return self._kind() == "number"

    def _expects(self) -> bool:
        """Whether E is an expectation: with a script or bracket, or before what it is of."""
        if self._text() in ("_", "["):
            return True
        return self._kind() == "space" and (
            self._text(1) in ("(", "[", "|") or self._kind(1) == "name"
        )

    def _group(self) -> str:
        """What stands between the brackets that open here, without these."""
        close, depth, start = {"(": ")", "{": "}"}[self._take()], 1, self.place
        opening = self.tokens[start - 1][1]
        while self.place < len(self.tokens) and depth:
            text = self._take()
            depth += (text == opening) - (text == close)
        inner = _Reader("")
        inner.tokens = self.tokens[start : self.place - 1]
        return inner.all()

    def _script(self, *, raised: bool = False) -> str:
        """What belongs to a script: a group, or names and numbers joined without a space."""
        if self._text() == "{" or (raised and self._text() == "("):
            return self._group()
        parts = []
        if self._text() in ("-", "<", ">"):
            parts.append(OPERATORS.get(self._text(), self._take()))
        while self._kind() in ("name", "number"):
            name = self._kind() == "name"
            part = self._script_name() if name else self._take()
            if name:
                part = self._accented(part)
                while self._text() == "'":
                    part += self._take()
            if self._text() == "_" and self._kind(1) in ("name", "number"):
                self.place += 1
                part += f"_{{{self._script()}}}"
            parts.append(part)
            if self._text() not in (",", "~", "-") or self._kind(1) == "space" or raised:
                break
            if self._kind(1) not in ("name", "number") and self._text(1) != "<":
                break
            parts.append(OPERATORS.get(self._text(), self._text()))
            self.place += 1
            if self._text() == "<":
                parts.append(self._take())
        return "".join(parts)

    def _script_name(self) -> str:
        text = self._text()
        if len(text) == 2 and not self._known(text):
            self.place += 1
            return text
        return self._name().strip()
