"""``compressor kernels``: compile the kernels for packed models after the installation."""

from __future__ import annotations

import shlex

import typer

kernels = typer.Typer(name="kernels")


@kernels.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    """Compile the kernels that multiply with packed matrices; `compressor doctor` says which are used."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@kernels.command()
def build() -> None:
    """Compile the kernels with the C++ compiler of this machine (CXX, or g++, or clang++), and load them.

    Needed only where there was no compiler at installation. They go to ~/.cache/compressor/kernels.
    """
    from compressor.kernels.build import compile_kernels
    from compressor.kernels.native import built_file, forget, load, native
    from compressor.run.doctor import kernels_text

    target = built_file()
    typer.echo(shlex.join(compile_kernels(target)))
    made = load(target)
    typer.echo(f"{target}: {kernels_text(made)}")
    forget()
    used = native()
    if used is not None and used.file != target:
        typer.echo(f"used before it: {used.file}, which was compiled from the same sources at installation")
