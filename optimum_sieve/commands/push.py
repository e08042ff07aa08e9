"""`optimum-cli sieve push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class PushCommand(SieveSubcommand):
    """Push a pruned model to the Hugging Face Hub."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve push`."""
        parser.description = "Push a directory written by `sieve prune` to the Hub, in one commit."
        parser.add_argument("--model", metavar="DIR", required=True, help="Directory of the pruned model.")
        parser.add_argument("--repo-id", metavar="NAME", required=True, help="Repository, such as user/name.")
        parser.add_argument(
            "--private",
            action="store_true",
            default=None,
            help="Make a new repository private (default: the account's setting).",
        )
        parser.add_argument("--revision", metavar="BRANCH", help="Branch to push to; created if it does not exist.")
        parser.add_argument("--commit-message", metavar="TEXT", help="Commit message.")
        parser.add_argument(
            "--create-pr", action="store_true", help="Open a pull request instead of committing to the branch."
        )
        parser.add_argument(
            "--space", metavar="NAME", help="Also push a Space with a page on which the model can be tried."
        )
        parser.add_argument(
            "--dense", metavar="MODEL", help="With --space: a model on the Hub whose answers the page shows beside."
        )
        parser.add_argument("--token", help="Hub token (default: HF_TOKEN, or the token stored by `hf auth login`).")
        parser.add_argument(
            "--with-examples", action="store_true", help="Push report.html also if it shows examples of the data."
        )
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Push."""
        from optimum_sieve.publish.hub import push_folder
        from optimum_sieve.publish.space import push_space

        if arguments.dense is not None and arguments.space is None:
            self.parser.error("--dense requires --space")
        pushed = push_folder(
            arguments.model,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.commit_message,
            create_pr=arguments.create_pr,
            token=arguments.token,
            with_examples=arguments.with_examples,
        )
        print(f"pushed to {pushed.pr_url or pushed.commit_url}")
        if arguments.space is not None:
            options = {"dense": arguments.dense, "private": arguments.private, "token": arguments.token}
            page = push_space(arguments.repo_id, arguments.space, **options)
            print(f"page pushed to {page.commit_url}")
