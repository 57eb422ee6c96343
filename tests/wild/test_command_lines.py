"""Commands of typer and click."""

from __future__ import annotations

import enum
from typing import Annotated

import click
import click.testing
import pytest
import typer
import typer.testing

from opero import opero

tries: list[str] = []


class Colour(enum.Enum):
    """Stands in an annotation, which is text here; typer looks for it where the function was written."""

    RED = "red"
    BLUE = "blue"


def second_time(text: str) -> str:
    tries.append(text)
    if len(tries) == 1:
        raise ConnectionError
    return text


program = typer.Typer()


@program.command()
@opero(min_delay=0)
def paint(
    name: str,
    count: int = 1,
    colour: Colour = Colour.RED,
    *,
    loud: Annotated[bool, typer.Option(help="Shout.")] = False,
) -> None:
    """Paint a thing."""
    text = second_time(f"{name} {count + 1} {colour.value}")
    typer.echo(text.upper() if loud else text)


@program.command()
@opero(min_delay=0)
def scrape(name: str) -> None:
    typer.echo(second_time(name))


@click.command()
@click.argument("name")
@click.option("--count", type=int, default=1, help="How many.")
@click.pass_context
@opero(min_delay=0)
def count_by_click(context: click.Context, name: str, count: int) -> None:
    """Count things."""
    click.echo(second_time(f"{context.info_name} {name} {count + 1}"))


ENDS = {
    "abort": typer.Abort(),
    "exit": typer.Exit(7),
    "bad": typer.BadParameter("no"),
    "click-abort": click.Abort(),
    "click-bad": click.BadParameter("no"),
}


@program.command()
@opero(min_delay=0)
def end(how: str) -> None:
    tries.append(how)
    raise ENDS[how]


@pytest.fixture(autouse=True)
def tried_anew():
    tries.clear()


def by_typer(*arguments: str) -> str:
    result = typer.testing.CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_command_of_typer_gets_the_options_of_its_signature():
    assert by_typer("paint", "wall", "--count", "2", "--colour", "blue", "--loud") == "WALL 3 BLUE\n"


def test_a_command_of_typer_is_retried():
    assert by_typer("paint", "wall") == "wall 2 red\n"
    assert len(tries) == 2


def test_the_help_of_typer_tells_what_the_function_says():
    told = by_typer("paint", "--help")
    assert "Paint a thing." in told
    assert "Shout." in told


def test_typer_refuses_a_value_of_a_wrong_type():
    result = typer.testing.CliRunner().invoke(program, ["paint", "wall", "--count", "many"])
    assert result.exit_code == 2
    assert tries == []


@pytest.mark.parametrize("how", ENDS)
def test_what_ends_a_command_is_not_retried(how):
    typer.testing.CliRunner().invoke(program, ["end", how])
    assert tries == [how]


def test_commands_of_typer_have_the_names_of_their_functions():
    assert {by_typer("scrape", "wall"), by_typer("paint", "wall")} == {"wall\n", "wall 2 red\n"}


def test_a_command_of_click_gets_its_parameters_and_is_retried():
    result = click.testing.CliRunner().invoke(count_by_click, ["tea", "--count", "2"], catch_exceptions=False)
    assert result.output == "count-by-click tea 3\n"
    assert len(tries) == 2


def test_a_command_of_click_has_the_name_and_the_text_of_the_function():
    assert count_by_click.name == "count-by-click"
    assert count_by_click.help == "Count things."
