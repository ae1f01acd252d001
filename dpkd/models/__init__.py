"""Networks: any timm backbone with one interface, and the heads of the objectives."""
