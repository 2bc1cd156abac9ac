//! Circles and floors of a drawing of arrows.

use std::collections::BTreeSet;

/// Points by their number, and arrows between them.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// Whom each point names.
    pub to: Vec<BTreeSet<usize>>,
}

/// Up to here the fewest arrows up are found by trying; the work doubles with each point.
const MOST_TRIED: usize = 18;

impl Graph {
    /// A drawing of so many points.
    pub fn new(points: usize, arrows: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut graph = Self {
            to: vec![BTreeSet::new(); points],
        };
        for (from, to) in arrows {
            if from != to {
                graph.to[from].insert(to);
            }
        }
        graph
    }

    /// The number of arrows.
    pub fn arrows(&self) -> usize {
        self.to.iter().map(BTreeSet::len).sum()
    }

    /// All points, in sets of those that reach each other; a set comes after those that it names.
    pub fn components(&self) -> Vec<Vec<usize>> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.to.len()];
        for point in 0..self.to.len() {
            visit(&self.to, point, &mut seen, &mut order);
        }
        let mut back = vec![BTreeSet::new(); self.to.len()];
        for (from, to) in self.to.iter().enumerate() {
            for to in to {
                back[*to].insert(from);
            }
        }
        seen.fill(false);
        let mut components = Vec::new();
        for point in order.into_iter().rev() {
            let mut component = Vec::new();
            visit(&back, point, &mut seen, &mut component);
            if !component.is_empty() {
                component.sort_unstable();
                components.push(component);
            }
        }
        components.reverse();
        components
    }

    /// The sets of several points that reach each other.
    pub fn circles(&self) -> Vec<Vec<usize>> {
        let mut circles = self.components();
        circles.retain(|component| component.len() > 1);
        circles
    }

    /// The floor of each point: one above the highest that it names. A circle is on one floor.
    pub fn floors(&self) -> Vec<usize> {
        let mut floors = vec![0; self.to.len()];
        for component in self.components() {
            let below = component
                .iter()
                .flat_map(|point| &self.to[*point])
                .filter(|to| !component.contains(to))
                .map(|to| floors[*to] + 1)
                .max();
            for point in component {
                floors[point] = below.unwrap_or(0);
            }
        }
        floors
    }

    /// The fewest arrows that point up, however the points are put one above the other. Circles of
    /// more than [`MOST_TRIED`] points are put by their arrows' balance: there it may be fewer.
    pub fn up(&self) -> usize {
        self.circles().iter().map(|circle| self.up_in(circle)).sum()
    }

    fn up_in(&self, circle: &[usize]) -> usize {
        if circle.len() > MOST_TRIED {
            return self.up_by_balance(circle);
        }
        let names: Vec<u32> = circle
            .iter()
            .map(|from| {
                let named =
                    |(bit, to): (usize, &usize)| u32::from(self.to[*from].contains(to)) << bit;
                circle.iter().enumerate().map(named).sum()
            })
            .collect();
        // The least cost of putting the points of a set at the bottom, one after the other: each
        // pays for those that it names and that are not below it yet.
        let mut least = vec![usize::MAX; 1 << circle.len()];
        least[0] = 0;
        for below in 0..least.len() {
            let cost = least[below];
            for (point, named) in names.iter().enumerate() {
                if below & (1 << point) == 0 {
                    let up = (named & !(below as u32)).count_ones() as usize;
                    let with = &mut least[below | (1 << point)];
                    *with = (*with).min(cost + up);
                }
            }
        }
        least.last().copied().unwrap_or_default()
    }

    fn up_by_balance(&self, circle: &[usize]) -> usize {
        let mut left = circle.to_vec();
        let mut up = 0;
        while !left.is_empty() {
            let named = |point: usize| left.iter().filter(|to| self.to[point].contains(to)).count();
            let Some(next) = left.iter().copied().min_by_key(|point| {
                let naming = left
                    .iter()
                    .filter(|from| self.to[**from].contains(point))
                    .count();
                (named(*point) + circle.len()).saturating_sub(naming)
            }) else {
                break;
            };
            up += named(next);
            left.retain(|point| *point != next);
        }
        up
    }
}

/// Adds the points that can be reached, each after those that it names.
fn visit(to: &[BTreeSet<usize>], point: usize, seen: &mut [bool], order: &mut Vec<usize>) {
    if !std::mem::replace(&mut seen[point], true) {
        for next in &to[point] {
            visit(to, *next, seen, order);
        }
        order.push(point);
    }
}

#[cfg(test)]
mod tests {
    use super::Graph;

    #[test]
    fn what_names_nobody_is_on_the_ground() {
        let graph = Graph::new(4, [(0, 1), (1, 2), (0, 2), (3, 2)]);
        assert_eq!(graph.floors(), [2, 1, 0, 1]);
        assert_eq!(
            (graph.arrows(), graph.up(), graph.circles().len()),
            (4, 0, 0)
        );
    }

    #[test]
    fn a_circle_is_on_one_floor_and_has_an_arrow_up() {
        let graph = Graph::new(4, [(0, 1), (1, 2), (2, 1), (2, 3)]);
        assert_eq!(graph.circles(), [[1, 2]]);
        assert_eq!(graph.floors(), [2, 1, 1, 0]);
        assert_eq!(graph.up(), 1);
    }

    #[test]
    fn both_ways_of_counting_agree_on_two_circles_through_one_point() {
        let graph = Graph::new(4, [(0, 1), (1, 0), (0, 2), (2, 0), (2, 3), (3, 2)]);
        let circle = [0, 1, 2, 3];
        assert_eq!((graph.up_in(&circle), graph.up_by_balance(&circle)), (3, 3));
    }
}
