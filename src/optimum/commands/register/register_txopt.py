"""``optimum-cli export txopt``: where Optimum's command line looks for the commands of other packages.

Optimum imports every file of this namespace folder, which therefore has no __init__.py, and reads REGISTER_COMMANDS. The command
hands its words to ``txopt export``; nothing of txopt is imported until it runs.
"""

from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class TxoptExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="txopt", help="Export an encoder-decoder to a verified artifact of txopt.")
    args: Any

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="what txopt export takes: a directory, a hub id, ...")
        parser.add_argument("--target", default="cpu", help="cpu or cuda")
        parser.add_argument("--precision", default="fp32", help="fp32, fp16 or bf16")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that came with the checkpoint")
        parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is at OUT")
        parser.add_argument("output", metavar="OUT", help="the directory to make")

    def run(self) -> None:
        from txopt.cli import main

        flags = [
            f"--{name.replace('_', '-')}" for name in ("trust_remote_code", "overwrite") if getattr(self.args, name)
        ]
        options = ["--target", self.args.target, "--precision", self.args.precision, *flags]
        main(["export", *options, "--", self.args.model, self.args.output])


REGISTER_COMMANDS = [(TxoptExportCommand, ExportCommand)]
