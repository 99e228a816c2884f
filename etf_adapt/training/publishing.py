"""A trainer that publishes a finished folder at its end, and nothing before."""

from __future__ import annotations

from typing import Any

from etf_adapt.hub.publish import publish
from etf_adapt.hub.send import HubError, check_name_and_token
from etf_adapt.training.resumable import ResumableTrainer


class PublishingTrainer(ResumableTrainer):
    """transformers' ``Trainer`` that sends to the Hub what is finished, in one commit (``etf_adapt.hub.publish.publish``).

    The stock one makes the repository before the first step, and sends the whole output folder, with the pickle that holds
    the token.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse now what would fail at the end; the repository is made when the folder is finished.

        Raises:
            HubError: The name is none that a repository can have, or there is no token.
        """
        if not self.args.hub_model_id:
            raise HubError("`hub_model_id` (=None) is needed to publish: user/name.")
        if self.is_world_process_zero():
            check_name_and_token(self.args.hub_model_id, token)
        self.hub_model_id: Any = self.args.hub_model_id
        self.push_in_progress = None

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Save the model and publish ``output_dir``.

        Args:
            commit_message: Title of the commit.
            blocking: True; a folder that is sent must not change meanwhile.
            token: None takes the one of the environment or of the login.
            revision: Branch; ``args.hub_revision`` where None.
            private: As ``args.hub_private_repo`` where None.
            kwargs: Of the stock card, which is not made: none.

        Returns:
            Address of the commit, on the first process.

        Raises:
            HubError: The Hub has not taken it.
            ValueError: An argument is not supported.
        """
        if not blocking or kwargs:
            raise ValueError(f"`push_to_hub` takes no {', '.join(kwargs) or 'blocking=False'}: leave it out.")
        self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        url = None
        try:
            if self.is_world_process_zero():
                url = publish(
                    str(self.args.output_dir),
                    str(self.hub_model_id),
                    private=self.args.hub_private_repo if private is None else private,
                    revision=revision or self.args.hub_revision,
                    commit_message=commit_message,
                    token=token,
                )
        finally:  # the others wait here, also for what fails
            self.accelerator.wait_for_everyone()
        return url
