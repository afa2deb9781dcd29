"""Tables of a log as units that can be read in parallel, with every row's position kept.

A unit is a text file, or one row group of a Parquet file. A row's number is
(index of the file among the sorted files) · 2^40 + (position in the file), so that the order of the log
survives any order of reading.
"""

from mtrec_ray.data.sources.base import ROW, SourceError, Unit
from mtrec_ray.data.sources.columns import id_strings, list_strings
from mtrec_ray.data.sources.units import list_units, read_strings, read_unit

__all__ = ["ROW", "SourceError", "Unit", "id_strings", "list_strings", "list_units", "read_strings", "read_unit"]
