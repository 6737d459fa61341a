"""`jaxaccum.testing`: what users test their own losses with."""
