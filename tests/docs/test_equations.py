"""Equations of docstrings as LaTeX, and LaTeX as MathML."""

import ast
import re
import xml.etree.ElementTree as ET

import pytest

from esscher.registry import catalogue
from esscher.report.equations import is_prose, latex_of, mathml, symbols_of, with_equations

EQUATIONS = {
    "pi(x_next | x, c) = N(mean, std^2)": (
        r"\pi (x_{\text{next}} \mid x, c) = N(\operatorname{mean} , \operatorname{std}^{2})"
    ),
    "J_D,i = E_expert[log D_i] - log(1 - D_i)": (
        r"J_{D,i} = \mathbb{E}_{\text{expert}}[\log D_{i}] - \log (1 - D_{i})"
    ),
    "L = -E log sigma(beta f'(u_chosen))": (
        r"L = -\mathbb{E} \log \sigma (\beta f'(u_{\text{chosen}}))"
    ),
    "max_pi E_pi[r] - beta D_f(pi || pi_ref)": (
        r"\max_{\pi} \mathbb{E}_{\pi}[r] - \beta D_{f}(\pi \,\Vert\, \pi_{\text{ref}})"
    ),
    "log pi(y_t given x, y_<t)": r"\log \pi (y_{t} \mid x, y_{<t})",
    "lambda f*(r + x) + C N^alpha": r"\lambda f^{\ast}(r + x) + C N^{\alpha }",
    "sqrt(abar_k) A + sqrt(1 - abar_k) eps": (
        r"\sqrt{\bar{a}_{k}} A + \sqrt{1 - \bar{a}_{k}} \epsilon"
    ),
    "Q_theta-bar_i, A-hat_t, Q_theta'_i": r"Q_{\bar{\theta}_{i}}, \hat{A}_{t}, Q_{\theta'_{i}}",
    "[G_1, ..., G_T-1]": r"[G_{1}, \dots , G_{T-1}]",
    "E_E~P": r"\mathbb{E}_{E\sim P}",
    "r(D+) > r(D-), D+_i": r"r(D^{+}) > r(D^{-}), D_{i}^{+}",
    "<g_f, g_b> / <g_f, g_f>": r"\langle g_{f}, g_{b}\rangle / \langle g_{f}, g_{f}\rangle",
    "A = (R - mu) / (s + 1e-8)": r"A = (R - \mu ) / (s + 10^{-8})",
    "u^(1-a) >= x0": r"u^{1-a} \ge x_{0}",
    "gan_weight softplus(-x_t)": r"\text{gan_weight} \operatorname{softplus} (-x_{t})",
    "min over E, G of E_P [loss of S]": (
        r"\min \ \text{over}\ E, G\ \text{of}\ \mathbb{E}_{P} [\text{loss of}\ S]"
    ),
    "lambda . phi(x)": r"\lambda \cdot \phi (x)",
}


@pytest.mark.parametrize("line", EQUATIONS)
def test_a_line_by_hand(line: str) -> None:
    def squeezed(text: str) -> str:
        return re.sub(r" (?=[_^}])", "", text)

    assert squeezed(latex_of(line)) == squeezed(EQUATIONS[line])


def test_sentences_beside_an_equation_stay_sentences() -> None:
    assert is_prose("the discriminators climb") and is_prose(
        "a reward: the optimum of RL with a KL"
    )
    assert not is_prose("L = mean of m(x+)") and not is_prose("[loss of S under G(E(S))]")
    line = "r_i   = log D_i              the agents' reward"
    assert latex_of(line) == r"r_{i}   = \log D_{i} \quad \text{the agents' reward}".replace(
        "   ", " "
    )


def test_only_the_formulas_of_a_cell_are_set() -> None:
    assert symbols_of("alpha, of the policy") == r"$\alpha$, of the policy"
    assert symbols_of("y, the return to go") == "$y$, the return to go"
    assert symbols_of("Polyak step of the target") == "Polyak step of the target"
    assert symbols_of("A(o, u')") == "$A(o, u')$"


def test_indented_lines_become_one_display() -> None:
    text = with_equations("Before\n\n    a = 1\n    b = 2\n\nafter\n\n    c = 3")
    assert text.count("$$") == 4 and "a = 1 \\\\\nb = 2" in text
    assert text.startswith("Before\n\n$$") and text.endswith("$$\nc = 3\n$$")


@pytest.mark.parametrize("slug", catalogue())
def test_every_equation_of_a_method_can_be_shown(slug: str) -> None:
    explained = ast.get_docstring(ast.parse(catalogue()[slug].path.read_text())) or ""
    shown = re.findall(r"\$\$\n(.*?)\n\$\$", with_equations(explained), re.DOTALL)
    assert len(shown) == len(re.findall(r"\n\n    ", explained))
    for formula in shown:
        found = mathml(formula, block=True)
        text = "".join(ET.fromstring(found).itertext())
        assert "\\" not in text and "$" not in text, text
        for name in ("pi", "beta", "sigma", "log_"):
            assert not re.search(rf"<m[io][^>]*>{name}<", found), name


def test_mathml_by_hand() -> None:
    found = mathml("f'(u) + \\bar{V} \\log u", block=False)
    root = ET.fromstring(found)
    space = "{http://www.w3.org/1998/Math/MathML}"
    assert root.tag == f"{space}math" and root.get("display") == "inline"
    assert "".join(root.itertext()) == "f\u2032(u)+V\u00aflogu"
    assert root.find(f".//{space}msup") is None, "primes stand on the line"
    assert root.find(f".//{space}mover[@class='bar']") is not None
    assert mathml("x", block=True).count('display="block"') == 1
    assert "model\u2019s" in mathml(r"\text{the model's own}", block=False)
