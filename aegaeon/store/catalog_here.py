"""The catalogue as an instance of a cluster sees it: what is to be served on its node only once the
files are there."""

import msgspec

from aegaeon.models.here import Here
from aegaeon.specs import Catalog
from aegaeon.store.catalog import CatalogStore, CatalogView


class CatalogHere(CatalogView):
    """That of `store`, as `node` has it `here`; of one version there is more, the more has come.
    One thread's alone."""

    def __init__(self, store: CatalogStore, here: Here, node: str) -> None:
        self._store = store
        self._here = here
        self._node = node

    def read(self) -> Catalog:
        """Return it as it is now. Raises as that of the store."""
        return catalog_here(self._store.read(), self._here, self._node)


def catalog_here(catalog: Catalog, here: Here, node: str) -> Catalog:
    """Return `catalog` with the places that models have on `node`, and without those that it is to
    serve and whose files it lacks."""
    wanted = catalog.on(node)
    present = {spec.id: spec for spec in here.present(wanted)}
    missing = {spec.id for spec in wanted} - present.keys()
    models = tuple(present.get(spec.id, spec) for spec in catalog.models if spec.id not in missing)
    return msgspec.structs.replace(catalog, models=models)
