"""A request that an instance has, and the tokens that it has made of it."""

from dataclasses import dataclass, field

import msgspec

from aegaeon.instance.waits import Wait
from aegaeon.measures import Waited
from aegaeon.types import InstanceId, NewToken, Request, TokenEvent


@dataclass(slots=True)
class Live:
    """A request that the scheduler knows, and the tokens it has generated here."""

    request: Request
    wait: Wait
    token_ids: list[int] = field(default_factory=list)
    is_leaving: bool = False
    may_stay: bool = False  # where nobody takes it, though it is to go elsewhere

    def so_far(self, waited: Waited) -> Request:
        """Return the request with all its tokens, as the next one to run it is told."""
        request = self.request
        return msgspec.structs.replace(
            request,
            generated_token_ids=(*request.generated_token_ids, *self.token_ids),
            moves=request.moves + 1,
            waited=waited,
        )

    def take(self, token: NewToken, instance: InstanceId, waited: Waited | None) -> TokenEvent:
        """Take in the next token; return what its proxy is told."""
        request, made = self.request, len(self.token_ids)
        known = 0 if made else min(token.cached_tokens, len(request.prompt_token_ids))
        self.token_ids.append(token.token_id)
        return TokenEvent(
            request_id=request.id,
            attempt=request.attempt,
            position=len(request.generated_token_ids) + made,
            token_ids=(token.token_id,),
            instance=instance,
            finish_reason=token.finish_reason,
            log_probs=() if token.log_probs is None else (token.log_probs,),
            waited=waited,
            cached_tokens=known,
        )
