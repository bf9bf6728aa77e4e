"""One image on several devices: strips of the segments, the plan, Ray actors."""
